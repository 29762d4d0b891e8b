"""What is said of models whose layers are not all alike."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from krasis.formats.checkpoints.hf_config import read_hf_config
from krasis.formats.models.drafting import with_draft
from krasis.formats.models.tensors import count_parameters
from krasis.runtime.cli.info_model import model_fields, model_to_json

CONFIGS = Path(__file__).parents[3] / "formats" / "models" / "configs"


def spec_of(name):
    return read_hf_config(json.loads((CONFIGS / f"{name}.json").read_text("utf-8")), name)


def fields_of(spec):
    counted = count_parameters(spec)
    parameters = {"total": counted.total, "active": counted.active, "experts": 0}
    record = {"model": model_to_json(spec), "max_context": spec.max_context, "parameters": parameters}
    json.dumps(record)
    return model_fields(record)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "glm-4.5-air",
            {
                "model": "glm4_moe, 46 layers (1 dense, 45 with experts), hidden 4,096",
                "experts": "128 a layer, top-8, intermediate 1,408, sigmoid router, shared expert of 1,408",
                "dense MLP": "intermediate 10,944",
                "attention": "96 heads, 8 KV heads, head size 128, 64 rotated",
                "left out": "drafting layers: 1",
            },
        ),
        (
            "mixtral-8x7b",
            {
                "model": "mixtral, 32 layers, hidden 4,096",
                "experts": "8 a layer, top-2, intermediate 14,336",
                "vocabulary": "32,000",
            },
        ),
        (
            "qwen2-57b-a14b",
            {"experts": "64 a layer, top-8, intermediate 2,560, shared expert of 20,480, gated"},
        ),
    ],
)
def test_the_lines(name, lines):
    found = fields_of(spec_of(name))
    assert lines.items() <= dict(found).items()
    assert dict(found)["parameters"].startswith(
        {"glm-4.5-air": "106.9 B", "mixtral-8x7b": "46.7 B", "qwen2-57b-a14b": "57.4 B"}[name]
    )


def test_kinds_of_layers_are_told_apart():
    attention = [text for label, text in fields_of(spec_of("gpt-oss-20b")) if label == "attention"]
    assert attention == [
        "64 heads, 8 KV heads, head size 64, window 128, in 12 layers",
        "64 heads, 8 KV heads, head size 64, in 12 layers",
    ]


def test_the_record_has_the_whole_description():
    spec = spec_of("glm-4.5-air")
    record = model_to_json(spec)
    assert type(spec).from_json(record["description"]) == spec
    assert (record["num_dense_layers"], record["num_expert_layers"]) == (1, 45)
    assert model_to_json(replace(spec, draft_layers=0))["num_draft_layers_left_out"] == 0


def test_a_layer_that_drafts_is_shown_apart():
    spec = spec_of("glm-4.5-air")
    drafting = with_draft(spec)
    found, plain = dict(fields_of(drafting)), dict(fields_of(spec))
    assert found.pop("drafting") == "a layer for multi-token prediction"
    assert plain.pop("left out") == "drafting layers: 1"
    assert found == plain
