"""--rope-scaling: what it takes, what it refuses, how far it reaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.formats.architecture import RopeScaling
from krasis.formats.errors import UsageError
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.registry import spec_from_hf
from krasis.formats.models.uniform import architecture_of, spec_of
from krasis.runtime.planning.presets import shape
from krasis.runtime.rope_option import parse_rope_scaling, rescaled, rescaled_model
from krasis.runtime.settings import EngineSettings

CONFIGS = Path(__file__).parents[1] / "formats/models/configs"
MODEL = architecture_of(shape("qwen3-30b-a3b"), "")  # 40,960 positions, no scaling


@pytest.mark.parametrize(
    ("text", "scaling", "longest"),
    [
        ("none", RopeScaling(), 40960),
        ("linear,2", RopeScaling("linear", 2.0), 81920),
        ("yarn,4,32768", RopeScaling("yarn", 4.0, 32768), 131072),
        (" yarn , 4.0 , 32768 ", RopeScaling("yarn", 4.0, 32768), 131072),
        ("yarn,4", RopeScaling("yarn", 4.0, 40960), 163840),
        ("yarn,1,32768", RopeScaling("yarn", 1.0, 32768), 40960),
        (
            "yarn,2,32768,beta_fast=16,beta_slow=2,attention_factor=1",
            RopeScaling("yarn", 2.0, 32768, 1.0, 16.0, 2.0),
            65536,
        ),
    ],
)
def test_reads(text: str, scaling: RopeScaling, longest: int) -> None:
    changed = rescaled(MODEL, parse_rope_scaling(text))
    assert changed.rope_scaling == scaling
    assert changed.max_context == longest
    assert EngineSettings(rope_scaling=text, context=longest).context_for(changed.max_context) == longest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yarn",
        "linear",
        "none,2",
        "linear,2,3",
        "linear,2,beta_fast=1",
        "yarn,4,32768,5",
        "yarn,four",
        "yarn,nan,32768",
        "yarn,inf",
        "yarn,0.5,32768",
        "yarn,0",
        "yarn,-4,32768",
        "linear,0.9",
        "yarn,4,0",
        "yarn,4,-1",
        "yarn,4,32768.5",
        "yarn,4,1e30",
        "yarn,4,32768,beta=1",
        "yarn,4,32768,beta_fast=1,beta_fast=2",
        "dynamic,2",
        "longrope,2",
        "YARN,4",
    ],
)
def test_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(UsageError, match="--rope-scaling"):
        EngineSettings(rope_scaling=text)


@pytest.mark.parametrize(
    "text",
    ["yarn,4,40961", "yarn,1e7,32768", "yarn,4,32768,beta_fast=0", "yarn,4,32768,attention_factor=-1"],
)
def test_refuses_what_the_model_cannot_have(text: str) -> None:
    with pytest.raises(UsageError, match="--rope-scaling"):
        rescaled(MODEL, parse_rope_scaling(text))


def test_replaces_the_models_own() -> None:
    told = replace(MODEL, rope_scaling=RopeScaling("yarn", 4.0, 32768))  # as the card says
    grown = replace(told, max_positions=131072)  # and with the positions changed along
    assert told.max_context == grown.max_context == 131072
    assert rescaled(told, RopeScaling()).max_context == 40960
    assert rescaled(grown, RopeScaling()).max_context == 32768
    assert rescaled(grown, parse_rope_scaling("yarn,2")).max_context == 65536


def test_the_command_refuses_before_it_opens_anything() -> None:
    from krasis.runtime.cli.run import main

    result = CliRunner().invoke(main, ["no.krasis", "--prompt", "x", "--rope-scaling", "yarn,many"])
    assert result.exit_code == UsageError.exit_code
    assert "--rope-scaling" in result.output
    assert "yarn,4,32768" in result.output  # how it is written


@pytest.mark.parametrize("text", ["none", "linear,4", "yarn,4,32768", "yarn,2", "yarn,4,1024,beta_fast=16"])
def test_a_model_of_any_kind_is_rescaled_like_a_flat_one(text: str) -> None:
    scaling = parse_rope_scaling(text)
    assert rescaled_model(spec_of(MODEL), scaling) == spec_of(rescaled(MODEL, scaling))


def test_every_rotated_layer_is_rescaled() -> None:
    spec = spec_of(MODEL)
    plain = replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, rope=None))
    dense = replace(spec.layers[0], mlp=GatedMlp(96))
    mixed = replace(spec, layers=(dense, plain, *spec.layers))
    changed = rescaled_model(mixed, parse_rope_scaling("yarn,4,1024"))
    kinds = [layer.mixer.rope and layer.mixer.rope.scaling.kind for layer in changed.layers]
    assert kinds == ["yarn", None, *["yarn"] * len(spec.layers)]
    with pytest.raises(UsageError, match="out of range"):
        rescaled_model(mixed, RopeScaling("linear", 1e9))


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
def test_an_index_turns_by_the_same_angles(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    config = {key: one for key, one in config.items() if key not in ("rope_scaling", "rope_parameters")}
    scaled = config | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    spec = rescaled_model(spec_from_hf(config, name), parse_rope_scaling("linear,2"))
    assert [layer.mixer for layer in spec.layers] == [
        layer.mixer for layer in spec_from_hf(scaled, name).layers
    ]
