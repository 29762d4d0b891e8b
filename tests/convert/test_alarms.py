"""Weights that no training leaves stop a conversion, unless the user insists; honest zeros do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main
from krasis.formats.errors import FormatError
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout

Change = Callable[[dict[str, np.ndarray]], None]
EXPERT = "model.layers.1.mlp.experts.{e}.{part}_proj.weight"


def scale(pattern: str, factor: float) -> Change:
    def change(weights: dict[str, np.ndarray]) -> None:
        for name in weights:
            if pattern in name:
                weights[name] = weights[name] * np.float32(factor)

    return change


def fill(name: str, rows: slice, value: float = 0.0) -> Change:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name] = weights[name].copy()
        weights[name][rows] = value

    return change


def expert(*numbers: int, parts: tuple[str, ...] = ("gate", "up", "down"), factor: float = 0.0) -> Change:
    def change(weights: dict[str, np.ndarray]) -> None:
        for number in numbers:
            for part in parts:
                name = EXPERT.format(e=number, part=part)
                weights[name] = weights[name] * np.float32(factor)

    return change


def middle(name: str) -> Change:
    """A stretch of zeros that begins and ends within rows."""

    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name] = weights[name].copy()
        flat = weights[name].reshape(-1)
        flat[len(flat) // 4 + 13 : len(flat) // 2 + 17] = 0.0

    return change


DAMAGED: dict[str, tuple[Change, str]] = {
    "a matrix of an expert": (expert(2, parts=("down",)), "experts.2.down_proj"),
    "all experts": (expert(0, 1, 2, 3), "experts are all zero"),
    "many experts": (expert(1, 2), "2 of 4 experts"),
    "an attention matrix": (fill("model.layers.0.self_attn.v_proj.weight", slice(None)), "v_proj"),
    "the tail of one": (fill("model.layers.0.self_attn.q_proj.weight", slice(40, None)), "q_proj"),
    "within rows": (middle("model.layers.1.self_attn.o_proj.weight"), "o_proj"),
    "one weight everywhere": (fill("model.layers.0.self_attn.o_proj.weight", slice(None), 0.5), "o_proj"),
    "half an embedding": (fill("model.embed_tokens.weight", slice(60, None)), "embed_tokens"),
    "within rows of an embedding": (middle("model.embed_tokens.weight"), "embed_tokens"),
    "a norm": (fill("model.norm.weight", slice(None)), "model.norm"),
    "the end of a norm": (fill("model.layers.1.input_layernorm.weight", slice(32, None)), "input_layernorm"),
    "a router": (fill("model.layers.1.mlp.gate.weight", slice(None)), "mlp.gate"),
    "an output head": (fill("lm_head.weight", slice(0, 64)), "lm_head"),
    "too small for scales": (scale("down_proj", 2.0**-18), "0.down_proj"),
    "partly too small": (scale("down_proj", 2.0**-15), "0.down_proj"),
}
HONEST: dict[str, tuple[Change, str]] = {
    "padded vocabulary": (fill("lm_head.weight", slice(-2, None)), ""),
    "norms of ones": (fill("model.norm.weight", slice(None), 1.0), ""),
    "one expert that was never reached": (expert(3), "layer 1 expert 3"),
    "one that decay has shrunk": (expert(3, factor=1e-12), "layer 1 expert 3"),
    "few rows of zeros": (fill(EXPERT.format(e=0, part="gate"), slice(112, None)), "16 of 128 rows"),
    "small weights": (scale("_proj", 2.0**-6), ""),
    "large weights": (scale("down_proj", 2.0**12), ""),
}


def write(model_class: Any, model: Any, change: Change, folder: Path, **options: Any) -> Path:
    weights = dict(model.weights)
    change(weights)
    return model_class(model.shape, weights=weights).write_hf(folder, **options)


@pytest.mark.parametrize("case", DAMAGED)
def test_stops_for_damage(case: str, model: Any, model_class: Any, run: Any, tmp_path: Path) -> None:
    change, where = DAMAGED[case]
    source = write(model_class, model, change, tmp_path / "hf")
    with pytest.raises(FormatError, match="the weights look damaged") as caught:
        run([source], tmp_path / "out.krasis", gpu_group=64, num_threads=1)
    assert where in str(caught.value)
    assert "--force-weights" in str(caught.value)
    assert not (tmp_path / "out.krasis").exists()


@pytest.mark.parametrize("case", HONEST)
def test_goes_on_for_honest_zeros(case: str, model: Any, model_class: Any, run: Any, tmp_path: Path) -> None:
    change, note = HONEST[case]
    source = write(model_class, model, change, tmp_path / "hf")
    made = run([source], tmp_path / "out.krasis", gpu_group=64, num_threads=1)
    assert note in made.messages
    assert ("zero" in made.messages) == bool(note)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    keep = int(len(data) * share)
    path.write_bytes(data[:keep] + bytes(len(data) - keep))


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9, 0.97])
def test_stops_for_a_gguf_that_ends_in_zeros(share: float, q8_gguf: Path, run: Any, tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    shutil.copy(q8_gguf, broken)
    cut(broken, share)
    with pytest.raises(FormatError, match=r"damaged|NaN"):
        run([broken], tmp_path / "out.krasis", gpu_group=64, num_threads=1)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9, 0.97])
def test_stops_for_a_shard_that_ends_in_zeros(share: float, hf_dir: Path, run: Any, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(hf_dir, source)
    cut(sorted(source.glob("*.safetensors"))[-1], share)
    with pytest.raises(FormatError, match="damaged"):
        run([source], tmp_path / "out.krasis", gpu_group=64, num_threads=1)


def test_the_command_insists_and_continues(model: Any, model_class: Any, tmp_path: Path) -> None:
    source = write(model_class, model, DAMAGED["within rows"][0], tmp_path / "hf")
    arguments = [str(source), "-o", str(tmp_path / "out.krasis"), "--gpu-group", "64", "--json"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == FormatError.exit_code
    assert "o_proj" in refused.output
    assert not (tmp_path / "out.krasis").exists()
    forced = CliRunner().invoke(main, [*arguments, "--force-weights"])
    assert forced.exit_code == 0
    assert "o_proj" in forced.output  # told all the same
    assert (tmp_path / "out.krasis" / "manifest.json").exists()
    summary = json.loads(forced.output[forced.output.index("{") : forced.output.rindex("}") + 1])
    assert summary["resumed_units"] > 0  # what was done before the refusal is not done again


@pytest.mark.parametrize(
    "layout",
    [
        CpuTileLayout("q8"),
        CpuTileLayout("i4"),
        MarlinLayout(4, 128),
        MarlinLayout(4, None),
        MarlinLayout(8, 32),
        MarlinLayout(8, None),
        Int8RowsLayout(),
    ],
    ids=lambda layout: layout.layout_id,
)
def test_no_distribution_of_weights_is_refused_for_its_error(layout: Any) -> None:
    """Gaussian, heavy-tailed and one-outlier-a-group matrices lose less than what a format explains."""
    from krasis.formats.layouts.matrix import MatrixView
    from krasis.formats.native import Pool

    rng, n, k = np.random.default_rng(0), 128, 512
    spikes = np.full((n, k), 1.0 / 300.0)
    spikes[:, ::128] = 1.0
    matrices = [rng.standard_normal((n, k)), rng.standard_t(2.0, (n, k)), rng.standard_cauchy((n, k))]
    if getattr(layout, "bits", 8) == 8:
        matrices.append(spikes)
    with Pool(1) as pool:
        for matrix in matrices:
            view = MatrixView(np.ascontiguousarray(matrix, np.float32), "F32")
            if isinstance(layout, Int8RowsLayout):
                codes = np.zeros(layout.codes_shape(n, k), np.int8)
                stats = layout.pack(pool, view, codes, np.zeros(n, np.float32))
            else:
                record = np.zeros(layout.expert_record(k, n).record_bytes, np.uint8)
                stats = layout.pack_part(pool, "gate", view, record, hidden=k, intermediate=n)
            assert stats.relative_mse < layout.explained_error(k)
