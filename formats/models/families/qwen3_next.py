"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, a shared expert behind a gate."""

from __future__ import annotations

from krasis.formats.errors import FormatError
from krasis.formats.models.delta_names import delta_names, hybrid_names
from krasis.formats.models.drafting import mtp_names
from krasis.formats.models.family import DRAFTING, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    SOFTMAX,
    gguf_attention,
    gguf_experts,
    gguf_model,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_mlp,
    experts,
    layers_of,
    model,
    num_layers,
    qwen_dense_layers,
    softmax_router,
)
from krasis.formats.models.hf_rope import MROPE
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.spec import Layer, Mixer, ModelSpec

NAME = "qwen3_next"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    dense = qwen_dense_layers(config)
    mlp = dense_mlp(config) if any(dense) else None
    routed = gated_shared_experts(config, renormalise=config.flag("norm_topk_prob", default=True))
    return model(config, NAME, layers_of(hybrid_mixers(config), dense, mlp, routed))


def gated_shared_experts(config: Config, renormalise: bool = True) -> Experts:
    """Experts with a shared one behind a gate."""
    shared = GatedMlp(config.size("shared_expert_intermediate_size"))
    router = softmax_router(config, renormalise=renormalise)
    return experts(config, router, shared=shared, shared_gate=True)


def hybrid_mixers(config: Config) -> list[Mixer]:
    """Gated DeltaNet, and gated attention in every ``full_attention_interval``-th layer."""
    full = attention(
        config,
        rope={"partial": 0.25, "ignored": MROPE},
        qk_norm="head",
        output_gate="channel",
        bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_bias"),
    )
    interval = config.size("full_attention_interval", default=4)
    count = num_layers(config)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    known = {"linear_attention": gated_delta(config), "full_attention": full}
    return config.kinds("layer_types", count, known, default)


def gated_delta(config: Config) -> GatedDelta:
    """Gated DeltaNet by the usual fields."""
    return GatedDelta(
        config.size("linear_num_key_heads"),
        config.size("linear_num_value_heads"),
        config.size("linear_key_head_dim"),
        config.size("linear_value_head_dim"),
        config.size("linear_conv_kernel_dim"),
    )


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    return hybrid_from_gguf(keys, NAME)


def hybrid_from_gguf(keys: Keys, name: str) -> ModelSpec:
    """A model of Gated DeltaNet and gated attention. Drafting blocks at the end do not count."""
    refuse_gguf_features(keys, "leading_dense_block_count", "expert_weights_scale")
    keys.expect("expert_gating_func", SOFTMAX, 0)
    blocks = keys.size("block_count")
    count = blocks - keys.size("nextn_predict_layers", default=0, least=0)
    interval = keys.size("full_attention_interval", default=4)
    is_linear = keys.flags("attention.recurrent_layers", blocks)
    if is_linear is None:
        is_linear = tuple((i + 1) % interval != 0 for i in range(blocks))
    routed = gguf_experts(
        keys,
        renormalise=keys.flag("expert_weights_norm", default=True),
        shared=GatedMlp(keys.size("expert_shared_feed_forward_length")),
        shared_gate=True,
    )
    full = gguf_attention(keys, partial=True, qk_norm="head", output_gate="channel")
    mixers: dict[bool, Mixer] = {False: full, True: _gated_delta_from_gguf(keys)}
    return gguf_model(keys, name, [Layer(mixers[is_linear[i]], routed) for i in range(count)])


def _gated_delta_from_gguf(keys: Keys) -> GatedDelta:
    value_heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % value_heads:
        raise FormatError(
            "value heads do not divide evenly",
            where=keys.path("ssm.inner_size"),
            got=inner,
            limit=value_heads,
        )
    return GatedDelta(
        keys.size("ssm.group_count"),
        value_heads,
        keys.size("ssm.state_size"),
        inner // value_heads,
        keys.size("ssm.conv_kernel"),
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Qwen3NextForCausalLM",),
    reference="Qwen3NextForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen3next",
    spec_from_gguf=spec_from_gguf,
    names=hybrid_names("model.", dense=True) | delta_names(("model.",), fused=True),
    left_out={"mtp.": DRAFTING},
    drafts=mtp_names(),
)
