"""A model whose values exceed F16 answers as in transformers, or the error names the KV cache first."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

from tiny_gguf import mean_kl, read_tensors

from krasis.formats.errors import NativeError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.wider_cache import nonfinite_logits

CHECKPOINT = Path(__file__).parent.parent / "assets" / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def large_values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model with values 2^20 times as large and outputs as much smaller: the same function."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("large") / "hf"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    factors = {"v_proj": 2.0**20, "o_proj": 2.0**-20}
    tensors = {
        name: torch.tensor(values * np.float32(factors.get(name.split(".")[-2], 1.0))).to(torch.bfloat16)
        for name, values in read_tensors(CHECKPOINT).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bundle(large_values: Path) -> Path:
    from krasis.convert.conversion import convert, prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    out, reporter = large_values.parent / "large.krasis", Reporter(0)
    settings = ConvertSettings(num_threads=2, tiers=("cpu",))
    convert(prepare([large_values], out, settings, reporter), reporter)
    return out


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    from tokenizers import Tokenizer

    text = (CHECKPOINT / "heldout.txt").read_text("utf-8")[:2000]
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(text).ids[:150]


def opened(bundle: Path, **settings: object) -> Engine:
    chosen = EngineSettings(**{"context": 256, "threads": 1, "prefault": False, "device": "cpu", **settings})
    return Engine.open(bundle, chosen)


def test_the_text_is_transformers(
    large_values: Path, bundle: Path, tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(large_values, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = np.asarray(model(torch.tensor([tokens])).logits[0].numpy())
    with opened(bundle, prefill_chunk=64) as engine, caplog.at_level(logging.WARNING):
        found = engine.prefill(tokens, all_logits=True)
        assert mean_kl(expected, found) < 2e-3
        assert engine.settings.kv_dtype == "f32"
        assert list(engine.tokens) == tokens
    assert [record.message.count("--kv-dtype f32") for record in caplog.records] == [1]  # told once


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_an_answer_is_that_of_a_wide_cache(bundle: Path, tokens: list[int], activations: str) -> None:
    answers = []
    for dtype in ("f32", "f16"):
        with opened(bundle, kv_dtype=dtype, activations=activations) as engine:
            answer = engine.generate(tokens[:40], SamplingSettings(), max_tokens=12)
            answers.append("".join(piece.text for piece in answer))
            assert answer.stats.stop_reason in ("length", "end")
    assert answers[0] == answers[1]


def test_an_overflow_among_answers_is_mended(trained_bundle: Path, bundle: Path, tokens: list[int]) -> None:
    """The first token that overflows may be any."""
    with opened(bundle, kv_dtype="f32") as engine:
        engine.prefill(tokens[:20])
        expected = engine.decode(tokens[20]).copy()
    with opened(bundle) as engine:
        engine._held.tokens.extend(tokens[:20])  # as after loading a prefix whose cache overflowed
        state = engine._backend.state
        for layer in range(len(engine.bundle.spec.layers)):
            keys, _ = state.layer(0, layer)
            infinite = np.full_like(keys[:, :20], np.inf)
            state.import_(0, layer, infinite, infinite)
        np.testing.assert_array_equal(engine.decode(tokens[20]), expected)
        assert engine.tokens == tuple(tokens[:21])
        assert engine.settings.kv_dtype == "f32"


def test_a_usual_model_keeps_its_cache(trained_bundle: Path, tokens: list[int]) -> None:
    with opened(trained_bundle) as engine:
        engine.prefill(tokens)
        assert engine.settings.kv_dtype == "f16"


def test_without_memory_the_error_names_the_cache_first(
    bundle: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(bundle) as engine:
        monkeypatch.setattr("krasis.runtime.state.kv_store.available_memory_bytes", lambda: 1000)
        with caplog.at_level(logging.WARNING), pytest.raises(NativeError, match="NaN or infinite") as caught:
            list(engine.generate(tokens, max_tokens=3))
    sentence = str(caught.value)
    assert 0 < sentence.index("--kv-dtype f32") < sentence.index("krasis-info --verify")
    assert "cannot be had" in caplog.text


def test_weights_are_named_where_the_cache_is_wide(bundle: Path, tokens: list[int]) -> None:
    with opened(bundle, kv_dtype="f32") as engine:
        engine._backend._weights.final_norm[3] = np.nan
        with pytest.raises(NativeError, match="the weights are damaged") as caught:
            list(engine.generate(tokens, max_tokens=3))
    assert "--kv-dtype" not in str(caught.value)
    assert "--gpu-dtype bf16" in str(nonfinite_logits("f16"))
