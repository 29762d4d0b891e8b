"""Command A MoE: attention and experts side by side on one norm, rotation in window layers alone."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, num_layers, softmax_router
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "cohere2_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    count = num_layers(config)
    first = config.size("first_k_dense_replace", default=0, least=0)
    dense = config.kinds(
        "mlp_layer_types",
        count,
        {"dense": True, "sparse": False},
        ["dense" if i < first else "sparse" for i in range(count)],
    )
    sliding = _sliding_layers(config, count, first)
    routed = _experts(config)
    mlp = GatedMlp(config.size("prefix_dense_intermediate_size")) if any(dense) else routed
    rotated = config.size("prefix_dense_sliding_window_pattern", default=1) == 1
    layers = [
        Layer(
            _attention(config, sliding[i], sliding[i] or (dense[i] and rotated)),
            mlp if dense[i] else routed,
            parallel=True,
        )
        for i in range(count)
    ]
    scale = config.number("logit_scale", default=0.0625)
    return model(config, NAME, layers, norm=_norm(config), tied=True, logits_scale=scale)


def _norm(config: Config) -> Norm:
    if config.has("rms_norm_eps"):
        return Norm(config.number("rms_norm_eps"))
    return Norm(config.number("layer_norm_eps", default=1e-5), kind="layer")


def _sliding_layers(config: Config, count: int, first: int) -> list[bool]:
    prefix = config.size("prefix_dense_sliding_window_pattern", default=1)
    step = config.size("sliding_window_pattern", default=4)
    default = [bool((i + 1) % prefix) if i < first else bool((i - first + 1) % step) for i in range(count)]
    names = ["sliding_attention" if entry else "full_attention" for entry in default]
    known = {"sliding_attention": True, "full_attention": False}
    return config.kinds("layer_types", count, known, names)


def _attention(config: Config, sliding: bool, rotated: bool) -> Attention:
    bias = config.flag("attention_bias")
    window = config.size("sliding_window", default=4096) if sliding else None
    if not rotated:
        return attention(config, rotary=None, window=window, bias=bias, output_bias=bias)
    rope = {"style": "interleaved"}
    return attention(config, rope=rope, window=window, bias=bias, output_bias=bias)


def _experts(config: Config) -> Experts:
    scores = {"softmax": "softmax_of_top", "sigmoid": "sigmoid_of_top"}
    score = config.choice("expert_selection_fn", scores, "softmax")
    averaged = config.choice("shared_expert_combination_strategy", {"average": True, "sum": False}, "average")
    router = softmax_router(
        config,
        score=score,
        renormalise=config.flag("norm_topk_prob", default=True) and score == "sigmoid_of_top",
    )
    routed = experts(config, router, width="intermediate_size", shared_field="num_shared_experts")
    if routed.shared is None:
        return routed
    return experts(
        config, router, width="intermediate_size", shared_field="num_shared_experts", averaged=averaged
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Cohere2MoeForCausalLM",),
    reference="Cohere2MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="cohere2moe",
)
