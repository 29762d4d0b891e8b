"""LFM2-MoE: short gated convolutions with a few attention layers, sigmoid router."""

from __future__ import annotations

from krasis.formats.models.family import Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    SIGMOID,
    gguf_attention,
    gguf_experts,
    gguf_layers_of,
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
    sigmoid_router,
)
from krasis.formats.models.mlps import Router
from krasis.formats.models.names import PARTS, decoder_names
from krasis.formats.models.recurrent import ShortConv
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "lfm2_moe"
_SUM_EPSILON = 1e-6


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    count, first = num_layers(config), config.size("num_dense_layers", default=2, least=0)
    width = config.size("conv_L_cache", default=3, limit=64)
    known: dict[str, Mixer] = {
        "conv": ShortConv(config.size("hidden_size"), width, config.flag("conv_bias")),
        "full_attention": attention(config, rope={"theta": 1e6}, qk_norm="head"),
    }
    mixers = config.kinds("layer_types", count, known, ["full_attention"] * count)
    bias = config.flag("use_expert_bias", default=True)
    routed = experts(
        config, sigmoid_router(config, correction_bias=bias, sum_epsilon=_SUM_EPSILON), shared_field=None
    )
    dense = [i < first for i in range(count)]
    layers = layers_of(mixers, dense, dense_mlp(config) if any(dense) else None, routed)
    if config.has("tie_embedding"):
        table = {**config.table, "tie_word_embeddings": config.flag("tie_embedding")}
        config = Config(table, config.where)
    return model(config, NAME, layers, norm=Norm(config.number("norm_eps", default=1e-5)), tied=True)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Layers of convolutions have no heads of keys and values. llama.cpp
    divides by the sum of the weights whether the metadata says so or not."""
    refuse_gguf_features(keys)
    keys.expect("expert_gating_func", SIGMOID)
    keys.expect("expert_weights_norm", True)
    count = keys.size("block_count")
    kv_heads = keys.by_layer("attention.head_count_kv", count, int)
    conv = ShortConv(keys.size("embedding_length"), keys.size("shortconv.l_cache", least=1))
    mixers = [gguf_attention(keys, kv_heads=heads, qk_norm="head") if heads else conv for heads in kv_heads]
    router = Router(
        keys.size("expert_used_count"),
        "sigmoid",
        renormalise=True,
        scale=keys.number("expert_weights_scale", default=1.0) or 1.0,
        correction_bias=True,
        sum_epsilon=_SUM_EPSILON,
    )
    return gguf_model(keys, NAME, gguf_layers_of(keys, mixers, gguf_experts(keys, router=router)))


def _names() -> dict[str, Source]:
    names = decoder_names(
        mlp="feed_forward", expert_parts=("w1", "w3", "w2"), dense=True, correction="expert_bias"
    )
    layer, gguf = "model.layers.{i}.", "blk.{i}."
    theirs = {
        "attention.output": ("self_attn.out_proj", "attn_output"),
        "attention.q_norm": ("self_attn.q_layernorm", "attn_q_norm"),
        "attention.k_norm": ("self_attn.k_layernorm", "attn_k_norm"),
        "attention.norm": ("operator_norm", "attn_norm"),
        "experts.norm": ("ffn_norm", "ffn_norm"),
        "mlp.norm": ("ffn_norm", "ffn_norm"),
        "conv.input": ("conv.in_proj", "shortconv.in_proj"),
        "conv.output": ("conv.out_proj", "shortconv.out_proj"),
        "conv.conv": ("conv.conv", "shortconv.conv"),
    }
    theirs |= {
        f"mlp.{part}_proj": (f"feed_forward.{hf}", f"ffn_{part}")
        for part, hf in zip(PARTS, ("w1", "w3", "w2"), strict=True)
    }
    names |= {
        ours: Source((f"{layer}{hf}.weight",), (f"{gguf}{of_gguf}.weight",))
        for ours, (hf, of_gguf) in theirs.items()
    }
    bias = f"{layer}feed_forward.expert_bias"
    names["experts.router.correction_bias"] = Source((bias,), (f"{gguf}exp_probs_b.bias",))
    # llama.cpp's name, from when the norm was taken for the embedding's.
    final = ("token_embd_norm.weight", "output_norm.weight")
    names["final_norm"] = Source(("model.embedding_norm.weight",), final)
    return names


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Lfm2MoeForCausalLM",),
    reference="Lfm2MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="lfm2moe",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
)
