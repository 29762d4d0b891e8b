"""Importance weights of families whose layers differ: mean squares of what transformers gives each expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.convert.importance import load_calibration
from krasis.formats.bundle.reader import Bundle
from krasis.formats.models.registry import family_of_model_type
from krasis.runtime.cli.importance_command import main as importance
from krasis.runtime.cpu.weights import load_weights
from tests.support.random_weights import dequantised_state, write_checkpoint
from tests.support.tiny_checkpoints import tiny

transformers = pytest.importorskip("transformers")
CONTEXT, NUM_TOKENS = 170, 400
TEXT = "".join(chr(32 + one) for one in np.random.default_rng(4).integers(0, 95, 600))
Inputs = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


def opened(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch

    model_type = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    family = family_of_model_type(model_type)
    assert family is not None
    reference = getattr(transformers, family.reference)
    return reference.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def middle(experts: Any, number: int, x: Any) -> Any:
    """What an expert's down multiplies, by the module's own parameters and activation."""
    if hasattr(experts, "_apply_gate") and hasattr(experts, "gate_up_proj_bias"):  # gpt-oss
        return experts._apply_gate(x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
    if hasattr(experts, "_apply_gate") and (hasattr(experts, "swiglu_limit") or hasattr(experts, "limit")):
        # GLM-5.3, DeepSeek-V4
        return experts._apply_gate(x @ experts.gate_up_proj[number].T)
    gate, up = (x @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def given(model: Any, tokens: list[int], context: int) -> Inputs:
    """(layer, expert) -> inputs of gate and up, and of down, in windows of so many tokens."""
    import torch

    calls: dict[int, list[tuple[Any, Any]]] = {}
    modules: dict[int, Any] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split(".layers.")[1].split(".")[0])
            modules[layer] = module
            module.register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: calls.setdefault(layer, []).append(
                    tuple([*args, *kwargs.values()][:2])
                ),
                with_kwargs=True,
            )
    found: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    with torch.no_grad():
        for begin in range(0, len(tokens), context):
            model(torch.tensor([tokens[begin : begin + context]]))
        for layer, parts in calls.items():
            for x, ids in parts:
                rows = x.reshape(-1, x.shape[-1])
                for number in ids.unique().tolist():
                    own = rows[(ids.reshape(len(rows), -1) == number).any(dim=1)]
                    pair = own.numpy(), middle(modules[layer], number, own).numpy()
                    found.setdefault((layer, number), []).append(pair)
    return {
        key: tuple(np.concatenate(one) for one in zip(*pairs, strict=True)) for key, pairs in found.items()
    }


@pytest.mark.parametrize(
    "family", ["qwen3_next", "deepseek_v3", "gpt_oss", "gemma4", "qwen4_exp", "glm5_next", "deepseek_v4"]
)
def test_means_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    source, bundle, file = tiny(family, tmp_path / "hf"), tmp_path / "m.krasis", tmp_path / "c.h5"
    fixed = ["--gpu-group", "64", "--quiet", "--force-text", "--threads", "1"]
    done = CliRunner().invoke(convert, [str(source), "-o", str(bundle), *fixed], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    arguments = [str(bundle), "--text", str(tmp_path / "text.txt"), "-o", str(file)]
    arguments += ["--context", str(CONTEXT), "--max-tokens", str(NUM_TOKENS), "--experts", "cpu"]
    done = CliRunner().invoke(importance, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with Bundle.open(bundle) as one:
        spec, state = one.spec, dequantised_state(load_weights(one, "cpu"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids[:NUM_TOKENS]
    assert len(tokens) == NUM_TOKENS
    reference = opened(write_checkpoint(state, config, tmp_path / "reference"))
    expected = given(reference, tokens, min(CONTEXT, spec.max_context))
    assert {layer for layer, _ in expected} == set(spec.expert_layers)
    with h5py.File(file) as held:
        assert held.attrs["model_type"] == spec.family
        assert {int(layer) for layer in held["layers"]} == set(spec.expert_layers)
        counted = 0
        for (layer, number), pair in expected.items():
            group = held[f"layers/{layer}"]
            counted += int(group["tokens"][number])
            # Near-ties of a router may fall the other way.
            assert abs(int(group["tokens"][number]) - len(pair[0])) <= 2
            for name, inputs in zip(("hidden", "intermediate"), pair, strict=True):
                mean = np.square(inputs, dtype=np.float64).mean(axis=0)
                assert np.abs(group[name][number] - mean).sum() < 0.02 * mean.sum(), (layer, number, name)
        top_k = spec.experts_of(spec.expert_layers[0]).router.top_k
        assert counted == NUM_TOKENS * len(spec.expert_layers) * top_k
    # The converter takes it.
    assert set(load_calibration(file, spec).layers) == set(spec.expert_layers)
    again = [str(source), "-o", str(tmp_path / "n.krasis"), "--tiers", "gpu", "--calibration", str(file)]
    done = CliRunner().invoke(convert, [*again, *fixed], catch_exceptions=False)
    assert done.exit_code == 0, done.output
