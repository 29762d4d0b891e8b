"""Logits of the GPU's path against transformers in float32 on the dequantised weights of the same bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Relative errors of all logits together. 16-bit activations make the difference: seen on the double, bf16
# 4e-3, f16 5e-4.
LIMITS = {"bf16": 1e-2, "f16": 1.5e-3}
CPU_LIMIT = 1e-2  # of decode with CPU experts, whose activations are int8: seen 3e-3
# With 128 experts of random routers some tokens lie between two of them, and any rounding decides: the middle
# token is what the arithmetic is judged by, all together may be off by a few such tokens.
FLIPPED_LIMIT = 0.06

Record = Callable[[str, object], None]


def per_token_error(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


def text_tokens(engine: Any, count: int) -> list[int]:
    text = "def main() -> None:\n    for line in open(path):\n        print(line.strip())\n" * 40
    return engine.encode(text)[:count]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("memory", ["streamed", "resident"])
def test_prefill_of_the_trained_model(
    trained: Any,
    check: Any,
    open_engine: Callable[..., Any],
    streaming_vram: Callable[..., int],
    reference_logits: Callable[..., np.ndarray],
    relative_error: Callable[..., float],
    record_property: Record,
    dtype: str,
    memory: str,
) -> None:
    count = 600 if check.size == "real" else 40
    vram = {"vram_bytes": streaming_vram(trained.bundle, 1024)} if memory == "streamed" else {}
    engine = open_engine(trained.bundle, context=1024, gpu_dtype=dtype, **vram)
    tokens = text_tokens(engine, count)
    found = engine.prefill(tokens, all_logits=True)
    expected = reference_logits(trained.gpu, tokens)
    error = relative_error(found, expected)
    record_property("relative_error", f"{error:.2e}")
    assert error <= LIMITS[dtype]
    last = engine._backend.last_prefill
    assert last.path != "cpu"
    assert (last.bytes_copied > 0) == (memory == "streamed")
    # In pieces after a prefix, and after an edited end.
    engine.truncate(count // 3)
    again = engine.prefill(tokens[count // 3 :], all_logits=True)
    assert relative_error(again, expected[count // 3 :]) <= LIMITS[dtype]


@pytest.mark.parametrize("memory", ["cpu experts", "some resident", "all resident"])
def test_decode_of_the_trained_model(
    trained: Any,
    check: Any,
    open_engine: Callable[..., Any],
    streaming_vram: Callable[..., int],
    reference_model: Callable[[Any], Any],
    relative_error: Callable[..., float],
    record_property: Record,
    memory: str,
) -> None:
    """transformers goes on from its own cache with the experts that each token met: of the GPU's copy where
    they were resident, else of the CPU's.
    """
    import torch

    count, steps = (300, 24) if check.size == "real" else (24, 3)
    spare = {"cpu experts": 0, "some resident": 5 * trained.gpu.layers[0].experts.shape[1]}.get(memory)
    vram = {} if spare is None else {"vram_bytes": streaming_vram(trained.bundle, 512) + spare}
    engine = open_engine(trained.bundle, context=512, gpu_dtype="f16", **vram)
    tokens = text_tokens(engine, count + steps)
    engine.prefill(tokens[:count])
    assert engine._backend.last_prefill.path != "cpu"
    residency = engine._backend._parts.residency
    models: dict[bytes, Any] = {}
    with torch.no_grad():
        state = reference_model(trained.gpu)(torch.tensor([tokens[:count]]), use_cache=True).past_key_values
        found, expected, shares = [], [], []
        for token in tokens[count:]:
            resident = np.zeros((len(trained.gpu.layers), trained.gpu.architecture.num_experts), bool)
            if residency is not None:
                resident = residency.host_addresses != 0
            found.append(engine.decode(token).copy())
            key = resident.tobytes()
            model = models.get(key) or models.setdefault(key, reference_model(trained.mixed(resident)))
            output = model(torch.tensor([[token]]), past_key_values=state, use_cache=True)
            state = output.past_key_values
            expected.append(output.logits[0, 0].numpy())
            shares.append(resident.mean())
    error = relative_error(np.stack(found), np.stack(expected))
    record_property("relative_error", f"{error:.2e}")
    record_property("resident", f"{np.mean(shares):.2f}")
    assert error <= (LIMITS["f16"] if memory == "all resident" else CPU_LIMIT)
    wanted = {
        "cpu experts": shares[-1] == 0,
        "some resident": 0 < shares[-1] < 1,
        "all resident": shares[0] == 1,
    }
    assert wanted[memory], shares


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("label", ["30b", "235b"])
def test_prefill_of_real_layers(
    real_layers: Callable[[str], tuple[Path, list[int], np.ndarray]],
    open_engine: Callable[..., Any],
    streaming_vram: Callable[..., int],
    relative_error: Callable[..., float],
    record_property: Record,
    label: str,
    dtype: str,
) -> None:
    """The shapes of released models, with fewer experts and words so that float32 copies of them fit."""
    bundle, tokens, expected = real_layers(label)
    engine = open_engine(bundle, context=500, gpu_dtype=dtype, vram_bytes=streaming_vram(bundle, 500))
    found = engine.prefill(tokens, all_logits=True)
    errors = per_token_error(found, expected)
    record_property("median_error", f"{np.median(errors):.2e}")
    record_property("largest_error", f"{errors.max():.2e}")
    assert np.median(errors) <= LIMITS[dtype]
    assert relative_error(found, expected) <= FLIPPED_LIMIT
    last = engine._backend.last_prefill
    num_experts, record_bytes = engine.bundle.blob("layers.0.experts.gpu").shape
    if last.path == "streamed":
        assert last.bytes_copied == engine.architecture.num_layers * num_experts * record_bytes


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_saved_prefix_goes_on_with_the_same_bits(
    trained: Any,
    open_engine: Callable[..., Any],
    streaming_vram: Callable[..., int],
    tmp_path: Path,
    dtype: str,
) -> None:
    settings = {"context": 256, "gpu_dtype": dtype, "vram_bytes": streaming_vram(trained.bundle, 256)}
    engine = open_engine(trained.bundle, **settings)
    tokens = text_tokens(engine, 34)
    engine.prefill(tokens[:21])
    engine.save_prefix(tmp_path / "a.kv")
    expected = engine.prefill(tokens[21:], all_logits=True)
    engine.close()
    other = open_engine(trained.bundle, **{**settings, "context": 100})
    other.load_prefix(tmp_path / "a.kv")
    assert other.tokens == tuple(tokens[:21])
    np.testing.assert_array_equal(other.prefill(tokens[21:], all_logits=True), expected)


def test_krasis_run_says_where_it_ran(trained: Any, device_name: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from krasis.runtime.cli.run import main

    path = tmp_path / "a.kv"
    flags = [
        "--device",
        device_name,
        "--ctx",
        "300",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--threads",
        "2",
    ]
    first = CliRunner().invoke(
        main, [str(trained.bundle), "--raw", "--prompt", "import os\nimport ", *flags, "--save-kv", str(path)]
    )
    assert first.exit_code == 0, first.output
    assert "tok/s on GPU" in first.stderr
    more = [*flags, "--vram", "4GiB", "--gpu-dtype", "bf16", "--json", "--load-kv", str(path)]
    second = CliRunner().invoke(
        main, [str(trained.bundle), "--raw", "--prompt", "import os\nimport sys", *more]
    )
    assert second.exit_code == 0, second.output
    report = json.loads(second.stdout)
    assert report["num_cached_tokens"] > 2
    assert report["prefilled_on"].startswith("GPU")
    assert report["settings"]["vram_bytes"] == 4 * 2**30


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_keys_and_values_of_8_bits(
    trained: Any,
    open_engine: Callable[..., Any],
    reference_logits: Callable[..., np.ndarray],
    relative_error: Callable[..., float],
    record_property: Record,
    dtype: str,
) -> None:
    """A prompt, in pieces too, and tokens after it, all experts in VRAM: within 1 % of transformers' norm."""
    engine = open_engine(trained.bundle, context=1024, gpu_dtype=dtype, kv_dtype="int8")
    assert "int8 KV cache" in engine.description
    tokens = text_tokens(engine, 60)
    expected = reference_logits(trained.gpu, tokens)
    found = engine.prefill(tokens[:40], all_logits=True)
    engine.truncate(20)
    again = engine.prefill(tokens[20:40], all_logits=True)
    decoded = np.stack([engine.decode(token).copy() for token in tokens[40:]])
    for rows, wanted in ((found, expected[:40]), (again, expected[20:40]), (decoded, expected[40:])):
        error = relative_error(rows, wanted)
        record_property("relative_error", f"{error:.2e}")
        assert error <= (1e-2 if dtype == "f16" else 1.5e-2)
