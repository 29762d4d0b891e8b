"""Importance weights from a text: collected by the runtime, used by the converter, on the trained model."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.conversion import convert, prepare
from krasis.convert.importance import load_calibration
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.layouts import layout_from_id
from krasis.runtime.cli.importance_command import main
from krasis.runtime.importance import collect

MODEL = Path(__file__).parent.parent / "assets" / "tiny-qwen3-moe"
# Modules that the model was not trained on and that are no part of heldout.txt (see its PROVENANCE.md).
CALIBRATION_MODULES = ("bisect", "cmd", "plistlib", "wave")
NUM_TOKENS, NUM_HELD_OUT = 6_000, 3_000
CONTEXT = 512

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the trained model is not there")

# (layer, expert) -> inputs of gate and up [tokens, hidden], inputs of down [tokens, intermediate], float32
Inputs = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The checkpoint in float32."""
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(MODEL.glob("*.safetensors")):
        tensors |= {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    return tensors


@pytest.fixture(scope="module")
def expert_inputs(weights) -> Callable[[list[int]], Inputs]:
    """What every expert is given, by transformers' model and its router's weights: no code of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # several spin while they wait for each other, which is slow beside other tests
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.train(False)
    seen: dict[int, list[np.ndarray]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, arguments, index=index: seen.setdefault(index, []).append(arguments[0][0].numpy())
        )

    def run(tokens: list[int]) -> Inputs:
        seen.clear()
        with torch.no_grad():
            for begin in range(0, len(tokens), CONTEXT):
                model(torch.tensor([tokens[begin : begin + CONTEXT]]))
        found: Inputs = {}
        for index, parts in seen.items():
            x = np.concatenate(parts)
            prefix = f"model.layers.{index}.mlp"
            logits = x @ weights[f"{prefix}.gate.weight"].T
            ids = np.argsort(-logits, axis=-1)[:, : model.config.num_experts_per_tok]
            for expert in range(logits.shape[1]):
                rows = x[(ids == expert).any(axis=1)]
                gate = rows @ weights[f"{prefix}.experts.{expert}.gate_proj.weight"].T
                up = rows @ weights[f"{prefix}.experts.{expert}.up_proj.weight"].T
                found[index, expert] = rows, gate / (1 + np.exp(-gate)) * up
        return found

    return run


@pytest.fixture(scope="module")
def text() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((folder / f"{name}.py").read_text("utf-8") for name in CALIBRATION_MODULES)


@pytest.fixture(scope="module")
def tokens_of() -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def convert_model(out: Path, **settings) -> Path:
    reporter = Reporter(0)
    convert(prepare([MODEL], out, ConvertSettings(num_threads=2, **settings), reporter), reporter)
    return out


@pytest.fixture(scope="module")
def exact_bundle(tmp_path_factory) -> Path:
    """8-bit experts, as one converts to calibrate."""
    return convert_model(tmp_path_factory.mktemp("exact") / "q8.krasis", tiers=("cpu",))


@pytest.fixture(scope="module")
def calibration(exact_bundle, text, tmp_path_factory) -> Path:
    """By the command."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "text.txt").write_text(text, "utf-8")
    arguments = [str(exact_bundle), "--text", str(folder / "text.txt"), "-o", str(folder / "c.h5")]
    arguments += ["--context", str(CONTEXT), "--max-tokens", str(NUM_TOKENS)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"{NUM_TOKENS} tokens" in result.output
    assert f"--calibration {folder / 'c.h5'}" in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["c.h5", "text.txt"]
    return folder / "c.h5"


def test_the_means_are_those_of_transformers(calibration, text, tokens_of, expert_inputs):
    reference = expert_inputs(tokens_of(text)[:NUM_TOKENS])
    with h5py.File(calibration) as file:
        routed = 0
        for (layer, expert), (hidden, intermediate) in reference.items():
            group = file[f"layers/{layer}"]
            routed += int(group["tokens"][expert])
            # The bundle's weights are rounded to 8 bits: some near-ties of the router fall the other way.
            assert abs(int(group["tokens"][expert]) - len(hidden)) < 0.02 * len(hidden) + 5
            for name, inputs in (("hidden", hidden), ("intermediate", intermediate)):
                expected = np.square(inputs, dtype=np.float64).mean(axis=0)
                error = np.abs(group[name][expert] - expected).sum() / expected.sum()
                assert error < 0.03, (layer, expert, name)
        num_layers = 1 + max(layer for layer, _ in reference)
        assert routed == NUM_TOKENS * num_layers * 2  # every token, two experts, every layer


def test_the_file_says_where_it_comes_from(calibration, exact_bundle):
    with h5py.File(calibration) as file:
        said = dict(file.attrs)
    assert said["kind"] == "krasis importance"
    assert said["bundle"] == exact_bundle.name
    assert (said["num_tokens"], said["context"]) == (NUM_TOKENS, CONTEXT)
    assert said["experts"] == "cpu: cpu-q8-r32-b32"
    with Bundle.open(exact_bundle) as bundle:
        assert load_calibration(calibration, bundle.spec).layers.keys() == set(range(4))


def held_out_error(bundle: Path, inputs: Inputs, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Squared error of the experts' products with the inputs, relative to the products', by matrix."""
    totals = {name: np.zeros(2) for name in ("gate", "up", "down")}
    with Bundle.open(bundle) as opened:
        layout = layout_from_id(opened.manifest.layouts["gpu"])
        arch = opened.architecture
        for (layer, expert), (hidden, intermediate) in inputs.items():
            record = opened.map(f"layers.{layer}.experts.gpu")[expert]
            packed = layout.unpack_expert(record, arch.hidden_size, arch.expert_intermediate_size)
            for name, matrix, x in zip(totals, packed, (hidden, hidden, intermediate), strict=True):
                exact = weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"]
                totals[name] += [
                    np.square(x @ (matrix - exact).T, dtype=np.float64).sum(),
                    np.square(x @ exact.T, dtype=np.float64).sum(),
                ]
    return {name: error / whole for name, (error, whole) in totals.items()}


def test_calibrated_experts_err_less_on_a_text_that_nobody_saw(
    calibration, tokens_of, expert_inputs, weights, tmp_path
):
    held_out = (MODEL / "heldout.txt").read_text("utf-8")
    inputs = expert_inputs(tokens_of(held_out)[:NUM_HELD_OUT])
    plain, weighted = (
        held_out_error(convert_model(tmp_path / name, tiers=("gpu",), calibration=file), inputs, weights)
        for name, file in (("plain", None), ("weighted", calibration))
    )
    assert weighted["down"] < 0.985 * plain["down"]
    assert weighted["gate"] + weighted["up"] < 0.998 * (plain["gate"] + plain["up"])


def test_the_calibration_text_is_not_the_held_out_one(text):
    held_out = (MODEL / "heldout.txt").read_text("utf-8")

    def passages(of: str) -> Iterator[str]:
        yield from (" ".join(part.split()) for part in of.split("\n\n") if len(" ".join(part.split())) >= 80)

    assert not set(passages(text)) & set(passages(held_out))


def test_the_same_text_gives_the_same_bytes(exact_bundle, text):
    with Bundle.open(exact_bundle) as bundle:
        reports: list[int] = []
        first = collect(bundle, text, context=64, max_tokens=200, progress=reports.append)
        assert sum(reports) == bundle.architecture.num_layers
        assert first.to_bytes() == collect(bundle, text, context=64, max_tokens=200).to_bytes()
        assert first.to_bytes() != collect(bundle, text, context=32, max_tokens=200).to_bytes()


def test_refusals(exact_bundle, tmp_path):
    with Bundle.open(exact_bundle) as bundle, pytest.raises(UsageError, match="text is empty"):
        collect(bundle, "")
    arguments = [str(exact_bundle), "--text", __file__, "-o", str(tmp_path / "missing" / "c.h5")]
    result = CliRunner().invoke(main, [*arguments, "--max-tokens", "20"])
    assert result.exit_code > 0
    assert "c.h5: creating the file failed: No such file" in result.output
    result = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "c.h5"), "--experts", "gpu"])
    assert result.exit_code > 0
    assert "importance: error:" in result.output
    assert not list(tmp_path.iterdir())
