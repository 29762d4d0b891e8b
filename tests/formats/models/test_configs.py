"""Configs of released models, one or more a family, give the numbers of weights that their cards state."""

import json
from pathlib import Path

import pytest

from krasis.formats.models.registry import all_families, family_of_model_type, spec_from_hf
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import layer_state, sequence_bytes
from krasis.formats.models.tensors import count_parameters, layer_tensors

CONFIGS = Path(__file__).parent / "configs"
# Total and active weights in billions as the models' names and cards state them, right to half a unit of the
# last digit. Some cards count the embedding as active, some add pictures or drafting layers to the total.
STATED = {
    "qwen3-30b-a3b": ("30.5", "3"),
    "qwen3-235b-a22b": ("235", "22"),
    "qwen3-vl-235b-a22b": ("235", "22"),
    "qwen3-next-80b-a3b": ("80", "3.6"),
    "qwen3.5-35b-a3b": ("35", "3"),
    "qwen3.5-122b-a10b": ("122", "10"),
    "qwen3.5-397b-a17b": ("396", "17"),  # 397 with 0.5 of the vision part
    "glm-4.6": ("353", "33"),
    "glm-4.5-air": ("107", "13"),
    "minimax-m2": ("229", "10"),
    "mixtral-8x7b": ("46.7", "12.7"),
    "mixtral-8x22b": ("141", "39"),
    "qwen2-57b-a14b": ("57", "14"),
    "qwen1.5-moe-a2.7b": ("14.3", "2.7"),
    "olmoe-1b-7b": ("6.9", "1.2"),
    "granite-3b-a800m": ("3.3", "0.9"),
    "ernie-4.5-21b-a3b": ("22", "3"),
    "ernie-4.5-300b-a47b": ("299", "47"),
    "hunyuan-a13b": ("80", "13"),
    "dots.llm1": ("142.8", "14"),
    "hy3": ("295", "20"),
    "gpt-oss-120b": ("116.8", "5.13"),
    "gpt-oss-20b": ("20.9", "3.61"),
    "gemma-4-26b-a4b": ("25", "4"),
    "qwen3.8-flash-next": ("177", "7"),  # 125B-A6B and a table of 51B
    "deepseek-v3": ("671.0", "37"),
    "deepseek-v3.2": ("672", "37"),
    "deepseek-v2": ("236", "21"),
    "deepseek-v2-lite": ("15.7", "2.45"),  # the card's 2.4 is cut, not rounded
    "kimi-k2.5": ("1026", "32"),
    "glm-4.7-flash": ("30", "3.6"),
    "glm-5": ("744", "41"),
    "glm-5.3-flash": ("313", "17"),  # the card's 321 has the drafting layer
    "mistral-small-4": ("119", "6"),
    "deepseek-v4-flash": ("284", "13"),
    "deepseek-v4-pro": ("1573", "49"),
    "nemotron-3-nano-30b": ("31.6", "3.2"),
    "step-3.7-flash": ("197", "11"),
    "laguna-s-2.1": ("118", "8"),
    "mimo-v2-flash": ("309", "15"),
    "minimax-m3": ("426", "25"),
    "north-mini": ("30", "3"),
    "lfm2.5-8b-a1b": ("8.3", "1.6"),
    "ling-3-flash": ("124", "5"),
    "llama-4-scout": ("108", "17"),  # 109 with the vision part
    "llama-4-maverick": ("401", "17"),
    "kimi-linear-48b-a3b": ("49", "3"),
}
EMBEDDING_IS_ACTIVE = {
    *("qwen3.5-122b-a10b", "qwen3.5-397b-a17b", "qwen1.5-moe-a2.7b", "dots.llm1"),
    *("llama-4-scout", "llama-4-maverick"),
}
# Bytes of all routed experts at 4.5 bits a weight, in 10^9.
EXPERTS_GB = {
    "qwen3.5-35b-a3b": 18,
    "qwen3.5-122b-a10b": 65,
    "qwen3.5-397b-a17b": 217,
    "qwen3-next-80b-a3b": 43,
    "glm-4.5-air": 56,
    "glm-4.6": 189,
    "minimax-m2": 126,
    "gpt-oss-120b": 64,
    "gpt-oss-20b": 11,
    "gemma-4-26b-a4b": 13,
    "qwen3.8-flash-next": 68,
    "deepseek-v3": 368,
    "kimi-k2.5": 571,
    "glm-4.7-flash": 16,
    "mistral-small-4": 65,
    "glm-5": 408,
    "glm-5.3-flash": 171,
    "deepseek-v4-flash": 156,
    "deepseek-v4-pro": 870,
    "step-3.7-flash": 107,
    "minimax-m3": 232,
}
# Bytes that a token adds for good at 2 bytes a number, in 1,000; fixed bytes of recurrent states in 10^6.
STATES = {
    "qwen3.5-35b-a3b": (20, 63),
    "qwen3.5-122b-a10b": (25, 151),
    "qwen3.5-397b-a17b": (31, 189),
    "qwen3-next-80b-a3b": (25, 75),
    "glm-4.5-air": (188, 0),
    "glm-4.6": (377, 0),
    "minimax-m2": (254, 0),
    "gpt-oss-120b": (37, 0),
    "gemma-4-26b-a4b": (20, 0),
    "deepseek-v3": (70, 0),
    "glm-4.7-flash": (54, 0),
    "glm-5": (110, 0),
    "glm-5.3-flash": (17, 143 + 9.5),  # with its convolutions
    "kimi-linear-48b-a3b": (8, 42 + 2.8),
    "lfm2.5-8b-a1b": (12.3, 0.29),  # convolutions alone
    "deepseek-v4-flash": (192.5, 0),  # 7 if windows were dropped; 21 x 6144, 20 x 3072 and 2 x 1024 bytes
    "qwen3.8-flash-next": (28, 113),
}


def read(name):
    path = CONFIGS / f"{name}.json"
    return spec_from_hf(json.loads(path.read_text()), str(path))


def rounds_to(value, stated):
    digits = len(stated.partition(".")[2])
    return abs(value - float(stated)) <= 0.5 * 10**-digits * 1.001


def test_every_config_and_every_family_is_here():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(STATED)
    read_families = {read(name).family for name in STATED}
    assert read_families == {family.name for family in all_families()}


@pytest.mark.parametrize("name", STATED)
def test_counts_are_those_of_the_card(name):
    spec = read(name)
    counted = count_parameters(spec)
    total, active = STATED[name]
    embedding = spec.vocab * spec.hidden if name in EMBEDDING_IS_ACTIVE else 0
    assert rounds_to(counted.total / 1e9, total), counted.total / 1e9
    looked_up = counted.active + embedding
    assert rounds_to(looked_up / 1e9, active), looked_up / 1e9


@pytest.mark.parametrize("name", EXPERTS_GB)
def test_experts_take_the_room_that_they_are_said_to(name):
    spec = read(name)
    weights = sum(
        tensor.shape[0] * tensor.shape[1] * tensor.shape[2]
        for layer in spec.layers
        for tensor in layer_tensors(spec, layer)
        if tensor.store == "experts" and len(tensor.shape) == 3
    )
    assert weights * 4.5 / 8 / 1e9 == pytest.approx(EXPERTS_GB[name], abs=0.6)


@pytest.mark.parametrize("name", STATES)
def test_states_are_as_large_as_they_are_said_to_be(name):
    spec = read(name)
    thousands, fixed = STATES[name]
    grown = sequence_bytes(spec, 3 * 65536) - sequence_bytes(spec, 65536)
    assert grown / (2 * 65536) == pytest.approx(1000 * thousands, rel=0.03)
    if fixed is not None:  # convolutions add a little
        assert 1e6 * fixed <= sequence_bytes(spec, 0) <= 1e6 * fixed * 1.05 + 5e5
    recurrent = any(layer_state(spec, layer).fixed_bytes for layer in spec.layers)
    assert recurrent == (fixed != 0)


@pytest.mark.parametrize("name", STATED)
def test_a_description_survives_json(name):
    spec = read(name)
    text = json.dumps(spec.to_json())
    assert ModelSpec.from_json(json.loads(text)) == spec
    assert len(text) < 12_000  # distinct layers and a pattern, not every layer


def test_model_types_belong_to_one_family():
    names = [name for family in all_families() for name in family.model_types]
    assert len(set(names)) == len(names)
    assert all(family_of_model_type(name) is not None for name in names)
