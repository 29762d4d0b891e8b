"""Readers of GGUF metadata agree with those of config.json; what cannot be is refused, by name."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError
from krasis.formats.models.registry import all_families, spec_from_gguf, spec_from_hf
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import blobs, count_parameters
from krasis.runtime.missing_kernels import CPU_RUNS, needed_kernels, refuse_missing_kernels
from tests.support.tiny_checkpoints import FIELDS

CONFIGS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "configs").iterdir()}


@dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]


def gguf(name, arch, **keys):
    """Metadata as llama.cpp writes it for one of the configs, and the tensors that tell something."""
    config = CONFIGS[name].get("text_config", CONFIGS[name])
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope.freq_base": float(config.get("rope_theta", 1e4)),
        "expert_used_count": config["num_experts_per_tok"],
    } | {key.replace("__", "."): value for key, value in keys.items()}
    metadata = {f"{arch}.{key}": value for key, value in values.items() if value is not None}
    tensors = {"token_embd.weight": Shape((config["vocab_size"], config["hidden_size"]))}
    return metadata | {"general.architecture": arch}, tensors | {"output.weight": Shape(())}


LATENT = {
    "attention__head_count_kv": 1,
    "attention__key_length": 576,
    "attention__value_length": 512,
    "attention__kv_lora_rank": 512,
    "rope__dimension_count": 64,
    "leading_dense_block_count": 1,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
}
GGUFS = {
    "qwen3-30b-a3b": ("qwen3moe", {"expert_count": 128, "expert_feed_forward_length": 768}, ()),
    "mixtral-8x7b": (
        "llama",
        {"expert_count": 8, "feed_forward_length": 14336, "rope__dimension_count": 128},
        (),
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {
            "expert_count": 64,
            "feed_forward_length": 1024,
            "attention__layer_norm_rms_epsilon": 1e-5,
        },
        (),
    ),
    "glm-4.5-air": (
        "glm4moe",
        {
            "block_count": 47,
            "nextn_predict_layers": 1,
            "expert_count": 128,
            "expert_feed_forward_length": 1408,
            "feed_forward_length": 10944,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "rope__dimension_count": 64,
        },
        ("blk.0.attn_q.bias",),
    ),
    "glm-4.7-flash": (
        "deepseek2",
        LATENT
        | {
            "expert_count": 64,
            "expert_feed_forward_length": 1536,
            "feed_forward_length": 10240,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.8,
            "attention__q_lora_rank": 768,
            "attention__key_length_mla": 256,
            "attention__value_length_mla": 256,
        },
        ("blk.1.exp_probs_b.bias",),  # what tells that its router scores by sigmoids
    ),
    "deepseek-v2-lite": (
        "deepseek2",
        LATENT
        | {
            "expert_count": 64,
            "expert_feed_forward_length": 1408,
            "feed_forward_length": 10944,
            "expert_shared_count": 2,
            "expert_weights_scale": 1.0,
            "expert_gating_func": 1,
            "attention__key_length_mla": 192,
            "attention__value_length_mla": 128,
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 40.0,
            "rope__scaling__original_context_length": 4096,
            "rope__scaling__yarn_log_multiplier": 0.1 * 0.707,
        },
        (),
    ),
}


GLM_5_3 = {
    "expert_count": 288,
    "expert_feed_forward_length": 2048,
    "feed_forward_length": 12288,
    "expert_shared_count": 1,
    "leading_dense_block_count": 3,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
    "attention__head_count_kv": [int(i % 4 == 3) for i in range(45)] + [1],
    "attention__key_length": 512,
    "attention__value_length": 512,
    "attention__key_length_mla": 256,
    "attention__value_length_mla": 256,
    "attention__q_lora_rank": 1536,
    "attention__kv_lora_rank": 512,
    "rope__dimension_count": 0,
    "ssm__conv_kernel": 4,
    "kda__head_dim": 128,
    "kda__gate_lower_bound": -5.0,
    "attention__indexer__head_count": 32,
    "attention__indexer__key_length": 128,
    "attention__indexer__top_k": 2048,
    "attention__indexer__kpool": 4,
    "hyper_connection__count": 4,
    "hyper_connection__sinkhorn_iterations": 20,
    "hyper_connection__epsilon": 1e-6,
    "swiglu_clamp_exp": [10.0] * 46,
    "swiglu_clamp_shexp": [10.0] * 46,
    "block_count": 46,
    "nextn_predict_layers": 1,
}


@pytest.mark.parametrize("arch", ["glm5-next", "glm5next"])
def test_both_names_of_glm_5_3_in_ggufs_are_read(arch):
    spec = spec_from_gguf(*gguf("glm-5.3-flash", arch, **GLM_5_3))
    assert spec.draft_layers == 1
    assert replace(spec, draft_layers=0) == spec_from_hf(CONFIGS["glm-5.3-flash"], "config.json")


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"rope__dimension_count": 64}, UnsupportedModelError, "dimension_count"),
        ({"attention__indexer__kpool_select_tail": False}, UnsupportedModelError, "kpool_select_tail"),
        ({"swiglu_clamp_shexp": [10.0] * 45 + [7.0]}, None, ""),  # of the layer that drafts
        ({"swiglu_clamp_shexp": [7.0] + [10.0] * 45}, UnsupportedModelError, "swiglu_clamp_shexp.*got 7"),
        ({"swiglu_clamp_exp": [10.0] * 44}, FormatError, "a value a layer"),
        ({"hyper_connection__count": 65}, FormatError, "streams"),
        ({"attention__indexer__kpool": 0}, FormatError, "kpool"),
        ({"attention__head_count_kv": 1}, None, ""),
    ],
)
def test_unsound_metadata_of_glm_5_3(changes, error, complaint):
    metadata, tensors = gguf("glm-5.3-flash", "glm5-next", **GLM_5_3 | changes)
    if error is None:
        spec_from_gguf(metadata, tensors)
        return
    with pytest.raises(error, match=complaint):
        spec_from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, -5.0),
        ({"linear_lower_bound": None}, None),
        ({"linear_lower_bound": -3.0}, -3.0),
        ({"linear_attn_config": {"gate_lower_bound": None}}, -5.0),
        ({"linear_attn_config": {"gate_lower_bound": None, "safe_gate": False}}, None),
        ({"linear_attn_config": {"gate_lower_bound": -2.0}}, -2.0),
    ],
)
def test_the_bound_of_decays_is_that_of_transformers(fields, bound):
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in CONFIGS["glm-5.3-flash"]["text_config"].items() if k != "linear_attn_config"}
    reference = transformers.Glm5NextTextConfig(**config | fields)
    assert reference.linear_lower_bound == bound
    spec = spec_from_hf(config | fields | {"model_type": "glm5_next_text"}, "config.json")
    assert spec.layers[0].mixer.lower_bound == bound


@pytest.mark.parametrize(
    "name", ["index_kpool_always_select_tail", "index_kpool_compress", "mla_use_nope", "mhc"]
)
def test_what_glm_5_3_always_has_is_not_taken_away(name):
    config = CONFIGS["glm-5.3-flash"]
    with pytest.raises(UnsupportedModelError, match=name):
        spec_from_hf(config | {"text_config": config["text_config"] | {name: False}}, "config.json")


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_describes_the_model_of_the_checkpoint(name):
    arch, keys, extra = GGUFS[name]
    metadata, tensors = gguf(name, arch, **keys)
    tensors |= {tensor: Shape((1,)) for tensor in extra}
    expected = spec_from_hf(CONFIGS[name] | ({"rms_norm_eps": 1e-5} if name == "olmoe-1b-7b" else {}), name)
    assert spec_from_gguf(metadata, tensors) == expected


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"expert_count": None}, UnsupportedModelError, "a dense model"),
        ({"attention__head_count_kv": 7}, FormatError, "heads do not divide"),
        ({"expert_shared_count": 1}, UnsupportedModelError, "expert_shared_count"),
        ({"expert_gating_func": 2}, UnsupportedModelError, "expert_gating_func"),
        ({"attention__sliding_window": 4096}, UnsupportedModelError, "sliding_window"),
        ({"block_count": 10**9}, FormatError, r"block_count.*1\.\.10000"),
        ({"expert_used_count": 9}, FormatError, "more experts a token"),
        ({"attention__key_length": -1}, FormatError, "key_length"),
        ({"rope__freq_base": "x"}, FormatError, "finite number"),
        ({"rope__dimension_count": 64}, UnsupportedModelError, "dimension_count"),
    ],
)
def test_unsound_metadata_of_a_mixtral(changes, error, complaint):
    metadata, tensors = gguf("mixtral-8x7b", *GGUFS["mixtral-8x7b"][:1], **GGUFS["mixtral-8x7b"][1] | changes)
    with pytest.raises(error, match=complaint):
        spec_from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"rope__dimension_count": 256}, FormatError, "dimension_count.*got 256"),
        ({"attention__kv_lora_rank": None}, FormatError, "kv_lora_rank"),
        ({"attention__key_length_mla": 10**6}, FormatError, "nope_dim.*1..4096"),
        ({"expert_gating_func": 4}, UnsupportedModelError, "expert_gating_func"),
        ({"expert_group_count": 7}, FormatError, "do not divide into groups"),
        ({"attention__temperature_scale": 0.1}, FormatError, "temperature_length"),
        ({"attention__q_lora_rank": 0}, FormatError, "q_lora_rank"),
        ({"attention__sliding_window": 4096}, UnsupportedModelError, "sliding_window"),
    ],
)
def test_unsound_metadata_of_latent_attention(changes, error, complaint):
    metadata, tensors = gguf("glm-4.7-flash", "deepseek2", **GGUFS["glm-4.7-flash"][1] | changes)
    with pytest.raises(error, match=complaint):
        spec_from_gguf(metadata, tensors)


@pytest.mark.parametrize(
    ("name", "field", "value", "complaint"),
    [
        ("mixtral-8x7b", "hidden_act", "gelu", "hidden_act.*'gelu'"),
        ("glm-4.6", "scoring_func", "softmax", "scoring_func"),
        ("glm-4.6", "mlp_layer_types", ["sparse"] * 91 + ["odd"], "mlp_layer_types.*'odd'"),
        ("deepseek-v3", "topk_method", "greedy", "topk_method"),
        ("deepseek-v3", "rope_scaling", {"type": "longrope"}, "'longrope'"),
        ("gpt-oss-120b", "layer_types", ["chunked_attention"] * 36, "layer_types.*chunked"),
        ("minimax-m2", "attn_type_list", [0] * 62, "attn_type_list"),
        ("minimax-m2", "use_qk_norm", False, "use_qk_norm"),
        ("deepseek-v4-flash", "scoring_func", "sigmoid", "scoring_func"),
        ("deepseek-v4-flash", "compress_ratios", [7] * 44, "compress_ratios"),
        ("nemotron-3-nano-30b", "hybrid_override_pattern", "MX", "'X'"),
        ("nemotron-3-nano-30b", "mlp_hidden_act", "silu", "mlp_hidden_act"),
        ("llama-4-scout", "architectures", ["SomethingElse"], "architectures"),
        ("olmoe-1b-7b", "dual_chunk_attention_config", {"chunk_size": 1}, "dual_chunk"),
        ("kimi-linear-48b-a3b", "mla_use_nope", False, "mla_use_nope"),
    ],
)
def test_a_setting_that_is_not_understood_is_named(name, field, value, complaint):
    with pytest.raises(UnsupportedModelError, match=complaint):
        spec_from_hf(CONFIGS[name] | {field: value}, "config.json")


def test_a_wrapper_around_another_family_is_refused():
    config = {"model_type": "mistral3", "text_config": {"model_type": "mistral", "hidden_size": 5120}}
    with pytest.raises(UnsupportedModelError, match=r"text_config: model_type.*'mistral'.*mistral4"):
        spec_from_hf(config, "config.json")


def test_an_unknown_model_type_is_named():
    with pytest.raises(UnsupportedModelError, match="'kimi_k3'"):
        spec_from_hf({"model_type": "kimi_k3"}, "config.json")


LIES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([0, -1, 2**31, 10**30, -(10**400), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 5), st.text(max_size=3), st.none()), max_size=60),
    st.dictionaries(st.sampled_from(["type", "factor", "head_dim", "x"]), st.integers(-1, 9), max_size=3),
)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_lying_configs_are_refused_in_a_sentence(data):
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = json.loads(json.dumps(CONFIGS[name]))
    table = config.get("text_config", config)
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(sorted(table)))
        if data.draw(st.booleans()):
            table[field] = data.draw(LIES)
        else:
            table.pop(field, None)
        if not table:
            break
    try:
        spec = spec_from_hf(config, "dir/config.json")
        assert count_parameters(spec).total > 0
        assert ModelSpec.from_json(spec.to_json()) == spec
        list(needed_kernels(spec))
    except KrasisError as error:
        assert isinstance(error, FormatError | UnsupportedModelError)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_lying_descriptions_in_json_are_refused(data):
    """A manifest may come from anyone: each field, at any depth, gone, unknown or a lie."""
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    record = json.loads(json.dumps(spec_from_hf(CONFIGS[name], name).to_json()))
    place = record
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(LIES)
    try:
        spec = ModelSpec.from_json(record)
    except FormatError as error:
        assert str(error).startswith("model")  # noqa: PT017
    else:
        assert ModelSpec.from_json(spec.to_json()) == spec
        list(blobs(spec))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"extra": 1}, "unknown field.*'extra'"),
        ({"layers": []}, "layers"),
        ({"layers": [{}] * 10_001}, r"1\.\.10000"),
        ({"pattern": [0] * 10_001}, r"1\.\.10000"),
        ({"pattern": [1]}, "no such layer"),
        ({"pattern": [True]}, "no such layer"),
        ({"hidden": True}, "wrong type"),
        ({"hidden": 1.0}, "wrong type"),
        ({"hidden": 10**400}, "a number of"),
        ({"norm": {"eps": float("nan")}}, "out of range"),
        ({"norm": []}, "wrong type"),
        ({"family": "x" * 1000}, "too long"),
    ],
)
def test_a_description_is_read_strictly(change, complaint):
    record = spec_from_hf(CONFIGS["qwen3-30b-a3b"], "x").to_json()
    with pytest.raises(FormatError, match=complaint):
        ModelSpec.from_json(record | change)


# ---- what the backends lack --------------------------------------------------------------------------------

LACKS = {
    "ling-3-flash": "linear attention with gates of full rank",
    "llama-4-scout": "attention in chunks",
}


@pytest.mark.parametrize("name", LACKS)
def test_what_cannot_run_yet_is_named(name):
    spec = spec_from_hf(CONFIGS[name], name)
    with pytest.raises(UnsupportedModelError, match=f"config.json: no kernels yet for {LACKS[name]}"):
        refuse_missing_kernels(spec, "config.json")


def test_what_has_all_kernels_has_a_tiny_checkpoint():
    """Which converts and is run by ``tests/e2e/test_families.py``."""
    able = {spec_from_hf(config, name).family for name, config in CONFIGS.items()}
    lacking = {
        spec.family
        for name, config in CONFIGS.items()
        if set(needed_kernels(spec := spec_from_hf(config, name))) - CPU_RUNS
    }
    assert able - lacking == set(FIELDS)
    assert len(able) == len(all_families())


# What a config that lacks a field means. Tiny configs write every field out, so only this sees it.
DEFAULTS = {
    ("olmoe-1b-7b", "norm_topk_prob"): False,
    ("qwen3-30b-a3b", "norm_topk_prob"): False,
    ("glm-4.5-air", "norm_topk_prob"): True,
    ("qwen3-next-80b-a3b", "norm_topk_prob"): True,
}


@pytest.mark.parametrize(("name", "field"), DEFAULTS)
def test_an_absent_field_has_the_familys_default(name, field):
    config = {key: value for key, value in CONFIGS[name].items() if key != field}
    absent, default, other = (
        spec_from_hf(config | fields, name)
        for fields in ({}, {field: DEFAULTS[name, field]}, {field: not DEFAULTS[name, field]})
    )
    assert absent == default
    assert absent != other


@pytest.mark.parametrize(
    ("name", "older"),
    [("qwen3.8-flash-next", "qwen_sparse_attention"), ("glm-5.3-flash", "deepseek_sparse_attention")],
)
def test_kinds_of_layers_by_the_names_that_transformers_5_17_writes(name: str, older: str) -> None:
    def read(kinds: list[str]) -> ModelSpec:
        text = CONFIGS[name]["text_config"] | {"layer_types": kinds}
        return spec_from_hf(CONFIGS[name] | {"text_config": text}, name)

    count = CONFIGS[name]["text_config"]["num_hidden_layers"]
    kinds = ["linear_attention" if (i + 1) % 4 else "indexed_attention" for i in range(count)]
    assert read([older if kind == "indexed_attention" else kind for kind in kinds]) == read(kinds)
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        read(["sparse_attention", *kinds[1:]])
