"""Llama 4: chunked attention with rotation, every fourth layer full without, the experts' input weighed."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, layers_of, model, num_layers, softmax_router
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.rope import QueryTemperature
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "llama4"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    count = num_layers(config)
    rotated, plain = _rotated(config), _plain(config)
    interval = config.size("no_rope_layer_interval", default=4)
    rotates = config.items("no_rope_layers", count) if config.table.get("no_rope_layers") else None
    rotates = rotates or [int((i + 1) % interval != 0) for i in range(count)]
    mixers: list[Mixer] = [rotated if entry == 1 else plain for entry in rotates]
    router = softmax_router(config, score="sigmoid_of_top", renormalise=False)
    shared = GatedMlp(config.size("intermediate_size"))
    routed = experts(
        config, router, width="intermediate_size", shared_field=None, shared=shared, weigh_input=True
    )
    sparse = _sparse_layers(config, count)
    dense = [i not in sparse for i in range(count)]
    mlp = GatedMlp(config.size("intermediate_size_mlp")) if any(dense) else None
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, layers_of(mixers, dense, mlp, routed), norm=norm)


def _sparse_layers(config: Config, count: int) -> set[int]:
    step = config.size("interleave_moe_layer_step", default=1)
    layers = config.table.get("moe_layers")
    if layers is None:
        return set(range(step - 1, count, step))
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise config.unsupported("moe_layers", layers, "a list of layers")
    return set(layers)


def _rotated(config: Config) -> Attention:
    normed = config.flag("use_qk_norm", default=True)
    return attention(
        config,
        rope={"style": "interleaved", "theta": 500_000.0, "kinds": ("default", "llama3")},
        qk_norm="unweighted_after_rope" if normed else "none",
        chunk=config.optional_size("attention_chunk_size"),
    )


def _plain(config: Config) -> Attention:
    temperature = None
    if config.flag("attn_temperature_tuning", default=True):
        period = config.size("floor_scale", default=8192)
        temperature = QueryTemperature(config.number("attn_scale", default=0.1), period, shift=1)
    return attention(config, rotary=None, temperature=temperature)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "llama4_text"),
    architectures=("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    reference="Llama4ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="llama4",
    nested=(NAME,),
)
