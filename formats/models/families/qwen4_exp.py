"""Qwen3.8-Flash-Next: Qwen3.5's layers in gated residual streams, an index over blocks of keys, and a hashed
n-gram table.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.errors import FormatError
from krasis.formats.models.delta_names import delta_names, hybrid_names
from krasis.formats.models.families.qwen3_next import gated_delta, gated_shared_experts
from krasis.formats.models.family import DRAFTING, VISION, Family, Source, Transform
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, num_layers
from krasis.formats.models.hf_rope import MROPE, read_rope
from krasis.formats.models.mixers import Attention
from krasis.formats.models.ngram import rows_of_table
from krasis.formats.models.picks import Pick, PickOf, rows_of_groups
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Layer, ModelSpec, NgramTable, Residual

NAME = "qwen4_exp"
_FULL = ("full_attention", "indexed_attention", "qwen_sparse_attention")  # by version of transformers


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    routed = gated_shared_experts(config, renormalise=config.flag("norm_topk_prob", default=True))
    gate = config.choice("output_gate_type", {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}, "silu")
    full = _attention(config)
    delta = replace(gated_delta(config), gate=gate)
    known = {"linear_attention": delta} | dict.fromkeys(_FULL, full)
    interval, count = config.size("full_attention_interval", default=4), num_layers(config)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    mixers = config.kinds("layer_types", count, known, default)
    tables = _table_layers(config, count)
    if strays := sorted(i for i in tables if mixers[i - 1] is full):  # whose past has no place in a state
        raise config.unsupported("ple_layer_ids", strays, "layers of linear attention")
    layers = [Layer(mixer, routed, ngram=i + 1 in tables) for i, mixer in enumerate(mixers)]
    residual = Residual("gated", config.size("hc_count"), "mixer", rank=config.size("hc_lowrank"))
    table = _table(config, len(tables)) if tables else None
    return model(config, NAME, layers, residual=residual, ngram=table)


def _attention(config: Config) -> Attention:
    rope = {"ignored": MROPE}
    head_dim = config.size("head_dim")
    index = Selection(
        "block_mean",
        heads=config.size("indexer_n_heads"),
        dim=config.size("indexer_head_dim"),
        budget=config.size("indexer_budget"),
        block=config.size("indexer_compress_ratio"),
        key_heads=config.size("indexer_kv_heads", default=1),
        rope=read_rope(config, head_dim, ignored=MROPE),
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
        boundary=_boundary(config),
    )


def _boundary(config: Config) -> int:
    """The end of a text, the first if there are several."""
    ends = config.table.get("eos_token_id")
    if isinstance(ends, list) and ends:
        return Config({"eos_token_id": ends[0]}, config.where).size("eos_token_id", least=0)
    return config.size("eos_token_id", least=0)


_INDEX_PARTS = ("q", "k")
ROOTS = ("model.language_model.", "model.")  # beside a vision tower, or alone
_GATE = {"norm": "hc_norm", "down": "input_mix_weight_down", "up": "input_mix_weight_up"}
_INJECT = {"inject": "block_inject_weight"}
_TABLE = {
    "key": "key_proj",
    "value": "value_proj",
    "key_norm": "norm_key",
    "query_norm": "norm_query",
    "conv_norm": "norm_conv",
    "conv": "conv1d",
    "table": "ple_embedding.ngram_embedding",
}


def _names() -> dict[str, Source]:
    """Those of Qwen3.5, of the streams, of the index and of the table."""
    names = hybrid_names(*ROOTS) | delta_names(ROOTS, fused=False)
    for needless in ("attention.norm", "experts.norm", "final_norm"):
        del names[needless]
    layer = "layers.{i}."
    for ours, theirs in (("attention", "attn"), ("mlp", "mlp")):
        block = f"{layer}{theirs}_hyper_connection"
        names |= {f"{ours}.residual.{x}": _source(f"{block}.{y}") for x, y in (_GATE | _INJECT).items()}
    names |= {f"final_residual.{x}": _source(f"hyper_connection_mixer.{y}") for x, y in _GATE.items()}
    indexer = f"{layer}self_attn.indexer."
    names |= {f"index.{x}": _source(f"{indexer}index_qk_proj", _index_rows(x)) for x in _INDEX_PARTS}
    names |= {f"index.{x}_norm": _source(f"{indexer}{x}_layernorm") for x in _INDEX_PARTS}
    return names | {f"ngram.{x}": _source(f"{layer}ple.{y}") for x, y in _TABLE.items()}


def _index_rows(part: str) -> PickOf:
    """Queries or keys of the projection that has the index's queries and then its keys."""

    def pick(mixer: Attention) -> Pick:
        index = mixer.selection
        if index is None:
            raise FormatError("the layer has no index", where=NAME)
        sizes = (index.heads * index.dim, index.key_heads * index.dim)
        return rows_of_groups(1, sizes, _INDEX_PARTS.index(part))

    return pick


def _source(name: str, pick: PickOf | None = None) -> Source:
    is_norm = "norm" in name.rpartition(".")[2]
    transform: Transform = "add_one" if is_norm else "none"
    return Source(tuple(f"{root}{name}.weight" for root in ROOTS), (), transform=transform, pick=pick)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "qwen4_exp_text"),
    architectures=("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
    reference="Qwen4ExpForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen4exp",
    names=_names(),
    left_out={"mtp.": DRAFTING, "model.visual.": VISION},
    nested=(NAME,),
)
