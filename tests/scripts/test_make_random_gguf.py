"""Random GGUFs: read by others, the same every time, of the size and spread that is promised."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.checkpoints.gguf import GgufFile
from krasis.formats.models.spec import ModelSpec
from krasis.runtime import Engine, EngineSettings
from scripts.models import make_random_gguf
from scripts.models.make_random_gguf import gguf_bytes, main, make_gguf, spec_of
from scripts.models.model_shapes import BUNDLE_SHAPES, SHAPES
from scripts.models.moe_gguf import GGUF_TYPES

SMALL = replace(
    SHAPES["qwen3-30b-a3b"],
    vocab_size=1024,
    hidden_size=256,
    moe_intermediate_size=128,
    num_experts=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
    max_position_embeddings=512,
)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tensors are longer than a pool, as in real files."""
    monkeypatch.setattr(make_random_gguf, "POOL_BYTES", 1 << 18)


@pytest.mark.parametrize("expert_type", ["q4_0", "q8_0"])
def test_others_read_it(tmp_path: Path, expert_type: str) -> None:
    out, told = tmp_path / "a.gguf", []
    size = make_gguf(SMALL, expert_type, out, seed=1, num_threads=2, report=told.append)
    reader = gguf.GGUFReader(out)
    assert sum(told) <= gguf_bytes(SMALL, expert_type) == size - int(reader.data_offset)
    assert out.stat().st_size == size
    assert list(tmp_path.iterdir()) == [out]
    ours = GgufFile.open(out)
    assert ours.metadata["general.architecture"] == "qwen3moe"
    assert ours.metadata["qwen3moe.block_count"] == 2
    assert len(reader.tensors) == 2 * 12 + 3
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name, kind in {"attn_q": "q8_0", "ffn_gate_inp": "f32", "ffn_down_exps": expert_type}.items():
        assert by_name[f"blk.1.{name}.weight"].tensor_type == GGUF_TYPES[kind][0]
    assert by_name["blk.0.ffn_down_exps.weight"].shape.tolist() == [128, 256, 16]  # fastest first


def test_values_are_as_loud_as_trained_ones(tmp_path: Path) -> None:
    """Products with values of order one have values of order one; no expert is like another."""
    make_gguf(SMALL, "q4_0", tmp_path / "a.gguf")
    values = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    for name, fan_in in {"attn_q": 256, "attn_output": 256, "ffn_up_exps": 256, "ffn_down_exps": 128}.items():
        weights = values[f"blk.0.{name}.weight"]
        assert weights.std() == pytest.approx(fan_in**-0.5, rel=0.05), name
        assert abs(weights.mean()) < 0.02 * weights.std(), name
    np.testing.assert_allclose(np.linalg.norm(values["blk.0.ffn_gate_inp.weight"], axis=1), 2, rtol=1e-5)
    assert values["output_norm.weight"].mean() == pytest.approx(1, abs=0.05)
    gates = values["blk.1.ffn_gate_exps.weight"].reshape(16, -1)
    assert np.abs(np.corrcoef(gates) - np.eye(16)).max() < 0.1
    assert not np.array_equal(values["blk.0.ffn_up_exps.weight"], values["blk.1.ffn_up_exps.weight"])


def test_threads_do_not_change_a_byte_and_seeds_do(tmp_path: Path) -> None:
    made = {}
    for name, seed, threads in (("one", 3, 1), ("three", 3, 3), ("other", 4, 3)):
        make_gguf(SMALL, "q4_0", tmp_path / name, seed=seed, num_threads=threads)
        made[name] = (tmp_path / name).read_bytes()
    assert made["one"] == made["three"] != made["other"]


def test_it_converts_and_answers(tmp_path: Path) -> None:
    make_gguf(SMALL, "q4_0", tmp_path / "a.gguf")
    settings = ConvertSettings(tiers=("cpu",), num_threads=1)
    convert(prepare([tmp_path / "a.gguf"], tmp_path / "b.krasis", settings, Reporter(0)), Reporter(0))
    with Engine.open(tmp_path / "b.krasis", EngineSettings(threads=1, device="cpu")) as engine:
        logits = engine.prefill(list(range(40)), all_logits=True)
        assert np.isfinite(logits).all()
        assert 0.3 < logits.std() < 3
        assert np.isfinite(engine.decode(7)).all()


TINY = {"hidden_size": 128, "num_experts": 8, "vocab_size": 256, "moe_intermediate_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 64}
FAMILIES: dict[str, dict[str, int]] = {
    "qwen3.5-35b-a3b": TINY | HEADS | DELTA | {"num_hidden_layers": 4},
    "gpt-oss-20b": TINY | HEADS | {"num_hidden_layers": 2},
    "glm-4.5-air": TINY | HEADS | {"num_hidden_layers": 2, "intermediate_size": 128},
    "deepseek-v3": TINY | LATENT | {"num_hidden_layers": 2, "intermediate_size": 128}
    | {"first_k_dense_replace": 1, "num_experts": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_families_say_what_they_are_and_answer(tmp_path: Path, name: str) -> None:
    """As the config describes them: every key and tensor is read again."""
    shape = BUNDLE_SHAPES[name].changed(FAMILIES[name])
    make_gguf(shape, "mxfp4" if "gpt" in name else "q8_0", tmp_path / "a.gguf")
    settings = ConvertSettings(tiers=("cpu",), num_threads=1)
    convert(prepare([tmp_path / "a.gguf"], tmp_path / "b.krasis", settings, Reporter(0)), Reporter(0))
    with Engine.open(tmp_path / "b.krasis", EngineSettings(threads=1, device="cpu", context=64)) as engine:
        assert parts(engine.bundle.spec) == parts(spec_of(shape))
        logits = engine.prefill(list(range(40)), all_logits=True)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


def parts(spec: ModelSpec) -> dict[str, object]:
    """Every field of a description by its path, in float32; but for a constant that GGUFs lack."""
    found: dict[str, object] = {}

    def walk(value: object, path: str) -> None:
        if is_dataclass(value):
            for one in fields(value):
                walk(getattr(value, one.name), f"{path}.{one.name}")
        elif isinstance(value, tuple):
            for index, one in enumerate(value):
                walk(one, f"{path}.{index}")
        elif not path.endswith("sum_epsilon"):
            found[path] = float(np.float32(value)) if isinstance(value, float) else value

    walk(spec, "spec")
    return found


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    done = CliRunner().invoke(main, ["--shape", "tiny", "--layers", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert len(gguf.GGUFReader(out).tensors) == 12 + 2  # tied: no head
    refused = CliRunner().invoke(main, ["--out", str(tmp_path / "no" / "a.gguf")])
    assert refused.exit_code == 1
    assert "Error" in refused.output
    with pytest.raises(ValueError, match="expert types are"):
        make_gguf(SMALL, "q2_k", out)
