import math

import pytest
from format_builders import (
    F32,
    STRING,
    U32,
    Gguf,
    gguf_pair,
    gguf_record,
    hf_config,
    qwen3moe_pairs,
    small_gguf,
)

from krasis.formats.architecture import Architecture, RopeScaling, from_gguf_metadata, from_hf_config
from krasis.formats.checkpoints.gguf import GgufFile
from krasis.formats.errors import FormatError, UnsupportedModelError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_reads_a_released_config():
    architecture = from_hf_config(hf_config(), "config.json")
    assert architecture == Architecture(
        model_type="qwen3_moe",
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_token=2,
        expert_intermediate_size=64,
        vocab_size=100,
        max_positions=512,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=RopeScaling(),
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    assert architecture.qkv_rows == 256
    assert architecture.attention_size == 128
    assert Architecture.from_json(architecture.to_json()) == architecture


@pytest.mark.parametrize(
    "scaling",
    [None, YARN, YARN | {"attention_factor": 1.25, "beta_fast": 16.0}, {"type": "linear", "factor": 2.0}],
)
def test_what_transformers_writes_means_the_same(scaling):
    transformers = pytest.importorskip("transformers")
    old = hf_config(rope_scaling=scaling)
    new = transformers.Qwen3MoeConfig(**old).to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    assert "rope_parameters" in new
    assert "num_local_experts" in new
    assert from_hf_config(new, "new") == from_hf_config(old, "old")


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        YARN | {"attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"beta_fast": 20, "beta_slow": 2, "truncate": False},
        YARN | {"factor": None},
    ],
)
def test_yarn_means_what_transformers_computes(scaling):
    """Frequencies from our record, by the paper's formulas, against transformers' own."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.Qwen3MoeConfig(**hf_config(rope_scaling=dict(scaling)))
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    record = from_hf_config(hf_config(rope_scaling=scaling), "x")
    yarn, dim, theta = record.rope_scaling, record.head_dim, record.rope_theta

    def correction(rotations):
        return dim * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(yarn.beta_fast), correction(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    for index in range(dim // 2):
        frequency = theta ** (-2 * index / dim)
        ramp = min(max((index - low) / ((high - low) or 0.001), 0), 1)
        value = frequency / yarn.factor * ramp + frequency * (1 - ramp)
        assert value == pytest.approx(expected[index].item(), rel=1e-5)
    factor = yarn.attention_factor
    assert (0.1 * math.log(yarn.factor) + 1 if factor is None else factor) == pytest.approx(expected_factor)


def test_defaults_are_those_of_transformers():
    record = from_hf_config(
        hf_config(
            rope_theta=...,
            norm_topk_prob=...,
            tie_word_embeddings=...,
            rms_norm_eps=...,
            head_dim=...,
            num_attention_heads=2,
        ),
        "x",
    )
    assert (record.rope_theta, record.norm_topk_prob, record.tie_word_embeddings) == (10_000.0, False, False)
    assert (record.rms_norm_eps, record.head_dim) == (1e-6, 32)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("model_type", "llama", "'llama'.*supported model types: .*qwen3_moe"),
        ("model_type", ..., "supported model types: .*qwen3_moe"),
        ("model_type", ["qwen3_moe"], "supported model types"),
        ("attention_bias", True, "attention_bias"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("mlp_only_layers", [0], "mlp_only_layers"),
        ("decoder_sparse_step", 2, "decoder_sparse_step"),
        ("hidden_act", "gelu", "hidden_act.*'gelu'"),
        ("quantization_config", {"quant_method": "hqq"}, "quantization_config"),
        ("layer_types", ["sliding_attention"], "layer_types"),
        ("architectures", ["Qwen3MoeForTokenClassification"], "architectures"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}, "rope_type.*'llama3'"),
        ("rope_scaling", {"rope_type": ["yarn"], "factor": 2.0}, "rope_type"),
        ("rope_scaling", YARN | {"high_freq_factor": 4.0}, "unknown setting.*high_freq_factor"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("head_dim", 24, "head_dim.*multiple of 16"),
        ("head_dim", 272, "too wide"),
        ("hidden_size", 96, "hidden_size.*got 96.*multiple of 64"),
        ("moe_intermediate_size", 80, "expert_intermediate_size.*multiple of 64"),
    ],
)
def test_unsupported_models_are_named(field, value, complaint):
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        from_hf_config(hf_config(**{field: value}), "dir/config.json")
    assert str(caught.value).startswith("dir/config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", ...),
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", -64),
        ("hidden_size", 1 << 40),
        ("num_hidden_layers", 10_001),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("num_experts", ...),
        ("num_experts", 1),
        ("vocab_size", 1 << 30),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", "small"),
        ("rope_theta", 0.0),
        ("norm_topk_prob", 1),
        ("rope_scaling", [1]),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.0}),
        ("rope_scaling", YARN | {"original_max_position_embeddings": 0}),
        ("rope_scaling", YARN | {"factor": -2.0}),
        ("rope_scaling", YARN | {"mscale": 1.0, "mscale_all_dim": -10 / math.log(4)}),
    ],
)
def test_unsound_fields_are_refused(field, value):
    with pytest.raises(FormatError, match=r"c.json"):
        from_hf_config(hf_config(**{field: value}), "c.json")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"surprise": 1}, "unknown field.*'surprise'"),
        ({"hidden_size": 64.0}, "hidden_size.*wrong type"),
        ({"hidden_size": True}, "hidden_size.*wrong type"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"model_type": 3}, "model_type"),
        ({"rope_scaling": None}, "rope_scaling.*object"),
        ({"num_layers": 0}, "num_layers.*1..10000"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_our_own_record_is_read_strictly(change, complaint):
    record = from_hf_config(hf_config(), "x").to_json() | change
    with pytest.raises(FormatError, match=complaint):
        Architecture.from_json(record)
    del record["vocab_size"]
    with pytest.raises(FormatError):
        Architecture.from_json(record)


def gguf_architecture(write, pairs, records=None):
    file = small_gguf()
    file.pairs = pairs
    if records is not None:
        file = Gguf(pairs=pairs, records=records, data=bytes(40_000))
    opened = GgufFile.open(write("m.gguf", file.build()))
    return from_gguf_metadata(opened.metadata, opened.tensors, "m.gguf")


def test_a_gguf_describes_the_same_model(write):
    record = gguf_architecture(write, qwen3moe_pairs())
    expected = from_hf_config(hf_config(rms_norm_eps=2.0**-20), "x")
    assert record == expected


def test_a_gguf_with_an_output_head_is_not_tied(write):
    records = [
        gguf_record("token_embd.weight", [64, 10], 0, 0),
        gguf_record("output.weight", [64, 10], 0, 2560),
    ]
    record = gguf_architecture(write, qwen3moe_pairs(), records)
    assert not record.tie_word_embeddings
    assert record.vocab_size == 10


def test_yarn_in_a_gguf(write):
    changes = {
        "qwen3moe__rope__scaling__type": (STRING, "yarn"),
        "qwen3moe__rope__scaling__factor": (F32, 4.0),
        "qwen3moe__rope__scaling__original_context_length": (U32, 128),
    }
    record = gguf_architecture(write, qwen3moe_pairs(**changes))
    assert record.rope_scaling == from_hf_config(hf_config(rope_scaling=YARN), "x").rope_scaling


@pytest.mark.parametrize(
    ("key", "value", "error", "complaint"),
    [
        ("general__architecture", (STRING, "llama"), UnsupportedModelError, "only models with experts"),
        ("qwen3moe__expert_count", ..., FormatError, "qwen3moe.expert_count"),
        ("qwen3moe__expert_count", (STRING, "4"), FormatError, "must be an integer"),
        ("qwen3moe__rope__freq_base", (F32, float("nan")), FormatError, "finite"),
        ("qwen3moe__attention__value_length", (U32, 64), UnsupportedModelError, "value_length"),
        ("qwen3moe__rope__scaling__type", (STRING, "longrope"), UnsupportedModelError, "'longrope'"),
        ("qwen3moe__expert_shared_count", (U32, 1), UnsupportedModelError, "expert_shared_count"),
        ("qwen3moe__embedding_length", (U32, 128), FormatError, "token_embd.weight.*wrong shape"),
    ],
)
def test_unsound_gguf_metadata(write, key, value, error, complaint):
    with pytest.raises(error, match=complaint):
        gguf_architecture(write, qwen3moe_pairs(**{key: value}))


def test_a_gguf_without_embedding(write):
    with pytest.raises(FormatError, match=r"token_embd.weight"):
        gguf_architecture(write, [*qwen3moe_pairs(), gguf_pair("x", U32, 1)], [])
