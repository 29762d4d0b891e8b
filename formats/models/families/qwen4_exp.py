"""Qwen3.8-Flash-Next: Qwen3.5's layers in gated residual streams, an index over blocks of keys, and a hashed
n-gram table.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.families.qwen3_next import gated_delta, gated_shared_experts
from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, num_layers, one_plus
from krasis.formats.models.hf_rope import MROPE, read_rope
from krasis.formats.models.mixers import Attention
from krasis.formats.models.ngram import rows_of_table
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Layer, ModelSpec, NgramTable, Residual

NAME = "qwen4_exp"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    routed = gated_shared_experts(config, renormalise=config.flag("norm_topk_prob", default=True))
    gate = config.choice("output_gate_type", {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}, "silu")
    full = _attention(config)
    delta = replace(gated_delta(config), gate=gate)
    known = {"linear_attention": delta, "full_attention": full, "indexed_attention": full}
    interval, count = config.size("full_attention_interval", default=4), num_layers(config)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    mixers = config.kinds("layer_types", count, known, default)
    tables = _table_layers(config, count)
    layers = [Layer(mixer, routed, ngram=i + 1 in tables) for i, mixer in enumerate(mixers)]
    residual = Residual("gated", config.size("hc_count"), "mixer", rank=config.size("hc_lowrank"))
    table = _table(config, len(tables)) if tables else None
    return model(config, NAME, layers, norm=one_plus(config), residual=residual, ngram=table)


def _attention(config: Config) -> Attention:
    rope = {"partial": 0.25, "ignored": MROPE}
    head_dim = config.size("head_dim")
    index = Selection(
        "block_mean",
        heads=config.size("indexer_n_heads"),
        dim=config.size("indexer_head_dim"),
        budget=config.size("indexer_budget"),
        block=config.size("indexer_compress_ratio"),
        key_heads=config.size("indexer_kv_heads", default=1),
        rope=read_rope(config, head_dim, partial=0.25, ignored=MROPE),
    )
    return attention(config, rope=rope, qk_norm="head", output_gate="channel", selection=index)


def _table_layers(config: Config, count: int) -> set[int]:
    """Numbers of the layers that add rows of the table, from 1."""
    layers = config.table.get("ple_layer_ids") or []
    if not isinstance(layers, list) or not all(type(i) is int and 1 <= i <= count for i in layers):
        raise config.unsupported("ple_layer_ids", layers, f"layers 1..{count}")
    return set(layers)


def _table(config: Config, num_tables: int) -> NgramTable:
    longest, heads = config.size("ngram_size", least=2, limit=16), config.size("heads_per_ngram", limit=256)
    base = config.size("ngram_vocab_size_base", limit=1 << 32)
    divisor = config.size("make_ngram_vocab_size_divisible_by", default=1)
    return NgramTable(
        longest=longest,
        heads=heads,
        dim=config.size("ple_embed_dim", "hidden_size"),
        rows=rows_of_table(base, heads * (longest - 1), num_tables, divisor),
        base=base,
        seed=config.size("seed", default=1234, least=0, limit=(1 << 63) - 1),
        conv_width=config.size("ple_conv_kernel_size", default=4, limit=64),
        dilation=longest,
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "qwen4_exp_text"),
    architectures=("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
    reference="Qwen4ExpForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen4exp",
    nested=(NAME,),
)
