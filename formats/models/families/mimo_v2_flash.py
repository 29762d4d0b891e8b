"""MiMo-V2-Flash: windows with twice the key heads and sinks, values narrower than keys."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, layers_of, model, num_layers, sigmoid_router
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "mimo_v2_flash"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("add_full_attention_sink_bias", False)
    config.expect("add_swa_attention_sink_bias", True)
    config.expect("n_shared_experts", 0)
    count = num_layers(config)
    known: dict[str, Mixer] = {
        "full_attention": _attention(config, sliding=False),
        "sliding_attention": _attention(config, sliding=True),
    }
    pattern = config.items("hybrid_layer_pattern", count) or [
        int(bool(i and (i + 1) % 6)) for i in range(count)
    ]
    default = ["sliding_attention" if entry == 1 else "full_attention" for entry in pattern]
    mixers = config.kinds("layer_types", count, known, default)
    frequency = config.items("moe_layer_freq", count) or [int(i > 0) for i in range(count)]
    kinds = ["sparse" if entry == 1 else "dense" for entry in frequency]
    dense = config.kinds("mlp_layer_types", count, {"dense": True, "sparse": False}, kinds)
    routed = experts(config, sigmoid_router(config), shared_field=None)
    layers = layers_of(mixers, dense, GatedMlp(config.size("intermediate_size")), routed)
    return model(
        config, NAME, layers, norm=Norm(config.number("rms_norm_eps", "layernorm_epsilon", default=1e-5))
    )


def _attention(config: Config, sliding: bool) -> Attention:
    kv_heads = config.size("num_key_value_heads")
    if not sliding:
        rope = {"layer_kind": "full_attention", "theta": 5e6, "partial": 0.334}
        return _of(config, kv_heads, rope)
    theta = config.number("swa_rope_theta", default=10_000.0)
    table = Config({key: value for key, value in config.table.items() if key != "rope_theta"}, config.where)
    rope = {"layer_kind": "sliding_attention", "theta": theta, "partial": 0.334}
    # The config counts the tokens before the query's own.
    past = config.optional_size("sliding_window_size")
    window = past + 1 if past else config.size("sliding_window")
    return _of(table, config.size("swa_num_key_value_heads", default=2 * kv_heads), rope, window)


def _of(config: Config, kv_heads: int, rope: dict[str, object], window: int | None = None) -> Attention:
    return attention(
        config,
        kv_heads=kv_heads,
        rope=rope,
        value_dim=config.size("v_head_dim"),
        value_scale=config.number("attention_value_scale", default=1.0),
        window=window,
        sinks=window is not None,
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("MiMoV2FlashForCausalLM",),
    reference="MiMoV2FlashForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="mimo2",
)
