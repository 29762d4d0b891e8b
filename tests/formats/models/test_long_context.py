"""What is refused and said of configurations for long contexts; what is computed is in e2e."""

from __future__ import annotations

from typing import Any

import pytest
from format_builders import hf_config

from krasis.formats.architecture import Architecture, RopeScaling, from_gguf_metadata, from_hf_config
from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError
from krasis.formats.models.long_context import gguf_context_notes, hf_context_notes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CHUNKS = {"chunk_size": 256, "local_size": 32, "original_max_position_embeddings": 256}


class Sized:
    shape = (100, 64)


def gguf(**rope: Any) -> tuple[dict[str, Any], Architecture]:
    keys = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
        **{f"rope.{name.replace('__', '.')}": value for name, value in rope.items()},
    }
    metadata = {"general.architecture": "qwen3moe", **{f"qwen3moe.{key}": one for key, one in keys.items()}}
    return metadata, from_gguf_metadata(metadata, {"token_embd.weight": Sized()})


def test_a_record_keeps_the_positions_of_its_source():
    told = from_hf_config(hf_config(rope_scaling=YARN), "config.json")
    assert (told.max_positions, told.max_context) == (512, 2048)
    assert told.to_json()["max_positions"] == 512  # bundles of before and after are the same bytes
    assert Architecture.from_json(told.to_json()).max_context == 2048
    assert list(hf_context_notes(hf_config(rope_scaling=YARN), told)) == [
        "YaRN rope scaling by 4: contexts of up to 2048 tokens can be opened"
    ]


def test_says_nothing_where_positions_were_changed_along():
    config = hf_config(rope_scaling=YARN, max_position_embeddings=2048)
    architecture = from_hf_config(config, "config.json")
    assert architecture.max_context == 2048
    assert not list(hf_context_notes(config, architecture))


def test_dual_chunk_attention_ends_at_the_original_length():
    config = hf_config(dual_chunk_attention_config=CHUNKS)
    architecture = from_hf_config(config, "config.json")
    assert architecture.max_context == 256
    (note,) = hf_context_notes(config, architecture)
    assert "dual chunk" in note
    assert "256" in note


@pytest.mark.parametrize(
    "changes",
    [
        {"dual_chunk_attention_config": {}},
        {"dual_chunk_attention_config": [1]},
        {"dual_chunk_attention_config": True},
        {"dual_chunk_attention_config": {**CHUNKS, "original_max_position_embeddings": 0}},
        {"dual_chunk_attention_config": {**CHUNKS, "original_max_position_embeddings": "long"}},
        {"dual_chunk_attention_config": CHUNKS, "rope_scaling": YARN},
    ],
)
def test_dual_chunk_attention_without_a_length_is_refused(changes):
    with pytest.raises(UnsupportedModelError, match="dual_chunk_attention_config"):
        from_hf_config(hf_config(**changes), "config.json")


def test_latent_attention_reads_settings_that_others_do_not():
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 512}
    metadata, architecture = gguf(**yarn, scaling__yarn_beta_fast=8.0, scaling__yarn_log_multiplier=0.1)
    plain = "".join(gguf_context_notes(metadata, architecture))
    assert "yarn_beta_fast, yarn_log_multiplier are not applied" in plain
    latent = metadata | {"qwen3moe.attention.kv_lora_rank": 64}
    assert "not applied" not in "".join(gguf_context_notes(latent, architecture))
    latent["qwen3moe.rope.scaling.yarn_ext_factor"] = 0.5
    assert "yarn_ext_factor is not applied" in "".join(gguf_context_notes(latent, architecture))


def test_a_ggufs_settings_that_llama_cpp_does_not_read_are_named():
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 512}
    metadata, architecture = gguf(**yarn, scaling__yarn_beta_fast=8.0, scaling__yarn_beta_slow=1.0)
    assert architecture.rope_scaling == RopeScaling("yarn", 4.0, 512)
    first, second = gguf_context_notes(metadata, architecture)
    assert "yarn_beta_fast is not applied" in first
    assert "2048" in second
    metadata, architecture = gguf(**yarn, scaling__yarn_beta_fast=32.0, scaling__yarn_ext_factor=-1.0)
    assert len(list(gguf_context_notes(metadata, architecture))) == 1


def test_a_gguf_without_a_scaling_has_none():
    for keys in ({}, {"scaling__factor": 0.0}, {"scaling__factor": 1.0}, {"scaling__type": "linear"}):
        assert gguf(**keys)[1].rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"scaling__type": "longrope"}, UnsupportedModelError),
        ({"scaling__type": "dynamic", "scaling__factor": 2.0}, UnsupportedModelError),
        ({"scaling__type": 7}, FormatError),
        ({"scaling__factor": "2"}, FormatError),
        ({"scaling__factor": -2.0}, FormatError),
        ({"scaling__factor": 0.5}, FormatError),
        ({"scaling__factor": float("nan")}, FormatError),
        ({"scale_linear": float("inf")}, FormatError),
        ({"scaling__factor": 2.0, "scaling__attn_factor": 0.5}, UnsupportedModelError),
        ({"scaling__type": "yarn", "scaling__factor": 2.0, "scaling__attn_factor": 0.0}, FormatError),
        ({"scaling__type": "yarn", "scaling__original_context_length": -5}, FormatError),
    ],
)
def test_a_ggufs_impossible_scaling_is_refused(keys: dict[str, Any], kind: type[KrasisError]):
    with pytest.raises(kind, match=r"rope"):
        gguf(**keys)
