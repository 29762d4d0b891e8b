"""gpt-oss: every other layer sees a window, sinks, biases everywhere, clamped SwiGLU."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, num_layers, softmax_router
from krasis.formats.models.mlps import Activation
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "gpt_oss"


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
    limit, alpha = config.number("swiglu_limit", default=7.0), config.number("swiglu_alpha", default=1.702)
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


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("GptOssForCausalLM",),
    reference="GptOssForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="gpt-oss",
)
