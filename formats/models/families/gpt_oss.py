"""gpt-oss: every other layer sees a window, sinks, biases everywhere, clamped SwiGLU."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, num_layers, softmax_router
from krasis.formats.models.mlps import Activation, Router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "gpt_oss"
_LIMIT, _ALPHA = 7.0, 1.702
_SOFTMAX_OF_TOP = 3  # llama.cpp's number


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    bias, count = config.flag("attention_bias", default=True), num_layers(config)
    window = config.size("sliding_window", default=128)
    mixers = {
        kind: attention(
            config, rope={"theta": 150_000.0}, bias=bias, output_bias=bias, sinks=True, window=width
        )
        for kind, width in (("sliding_attention", window), ("full_attention", None))
    }
    limit, alpha = (
        config.number("swiglu_limit", default=_LIMIT),
        config.number("swiglu_alpha", default=_ALPHA),
    )
    routed = experts(
        config,
        softmax_router(config, score="softmax_of_top", renormalise=False, bias=True),
        width="intermediate_size",
        activation=Activation("swiglu_offset", limit, alpha),
        shared_field=None,
        bias=True,
    )
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    layers = [Layer(mixer, routed) for mixer in config.kinds("layer_types", count, mixers, default)]
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata, which leaves out what is the same in all of them."""
    count, window = keys.size("block_count"), keys.size("attention.sliding_window")
    plain = gguf_attention(keys, bias=True, output_bias=True, sinks=True)
    if plain.rope is not None and plain.rope.scaling.kind == "yarn":  # a GGUF cannot say so
        scaling = replace(plain.rope.scaling, truncate=False)
        plain = replace(plain, rope=replace(plain.rope, scaling=scaling))
    full, narrow = plain, replace(plain, window=window)
    keys.expect("expert_gating_func", _SOFTMAX_OF_TOP, 0)
    routed = gguf_experts(
        keys,
        router=Router(keys.size("expert_used_count"), "softmax_of_top", renormalise=False, bias=True),
        activation=Activation("swiglu_offset", _LIMIT, _ALPHA),
        bias=True,
    )
    return gguf_model(keys, NAME, [Layer(full if i % 2 else narrow, routed) for i in range(count)])


def _names() -> dict[str, Source]:
    names = decoder_names(
        router="router",
        ffn_norm="post_attention_norm",
        qk_norm=False,
        biases=True,
        transposed=True,
        interleaved=True,
    )
    layer, block = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    both = f"{block}experts.gate_up_proj_bias"
    return names | {
        "attention.output.bias": Source((f"{layer}o_proj.bias",), ("blk.{i}.attn_output.bias",)),
        "attention.sinks": Source((f"{layer}sinks",), ("blk.{i}.attn_sinks.weight",)),
        "experts.router.bias": Source((f"{block}router.bias",), ("blk.{i}.ffn_gate_inp.bias",)),
        "experts.gate.bias": Source((both,), ("blk.{i}.ffn_gate_exps.bias",), "even_columns"),
        "experts.up.bias": Source((both,), ("blk.{i}.ffn_up_exps.bias",), "odd_columns"),
        "experts.down.bias": Source((f"{block}experts.down_proj_bias",), ("blk.{i}.ffn_down_exps.bias",)),
    }


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("GptOssForCausalLM",),
    reference="GptOssForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="gpt-oss",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
    released_in="MXFP4",
)
