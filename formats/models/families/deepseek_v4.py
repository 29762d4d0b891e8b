"""DeepSeek-V4: compressed attention, mixed residual streams, experts that some layers choose by the token."""

from __future__ import annotations

from collections.abc import Mapping

from krasis.formats.models.family import DRAFTING, Family, Source
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import experts, model, num_layers, sigmoid_router
from krasis.formats.models.hf_rope import read_rope
from krasis.formats.models.mixers import CompressedAttention
from krasis.formats.models.mlps import Activation
from krasis.formats.models.rope import Rope
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Layer, Mixer, ModelSpec, Residual

NAME = "deepseek_v4"
_CSA, _HCA, _WINDOW = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("scoring_func", "sqrtsoftplus")
    config.expect("attention_bias", False)
    config.expect("num_key_value_heads", 1)
    count = num_layers(config)
    limit = config.number("swiglu_limit", default=10.0)
    activation = Activation("silu_clamped_before", limit) if limit else Activation()
    table = Config({k: v for k, v in config.table.items() if k != "scoring_func"}, config.where)
    routed = {
        by_token: experts(
            config,
            sigmoid_router(
                table, score="sqrt_softplus", groups=1, by_token=by_token, correction_bias=not by_token
            ),
            activation=activation,
        )
        for by_token in (True, False)
    }
    first = config.size("num_hash_layers", default=3, least=0)
    default = ["hash_moe" if i < first else "moe" for i in range(count)]
    hashed = config.kinds("mlp_layer_types", count, {"hash_moe": True, "moe": False}, default)
    mixers = _mixers(config, count)
    layers = [Layer(mixer, routed[by_token]) for mixer, by_token in zip(mixers, hashed, strict=True)]
    eps, rounds = config.number("hc_eps", default=1e-6), config.size("hc_sinkhorn_iters", default=20)
    residual = Residual("hyper", config.size("hc_mult", default=4), "head", rounds=rounds, eps=eps)
    return model(config, NAME, layers, residual=residual)


def _mixers(config: Config, count: int) -> list[Mixer]:
    rates = config.child("compress_rates")
    sparse, heavy = rates.size(_CSA, default=4), rates.size(_HCA, default=128)
    known: dict[str, Mixer] = {
        _WINDOW: _attention(config, None),
        _CSA: _attention(config, sparse, sparse=True),
        _HCA: _attention(config, heavy),
    }
    ratios = config.items("compress_ratios", count)
    default = [_HCA if i < 2 or i % 2 == 0 else _CSA for i in range(count)]
    if ratios is not None:
        kinds = {0: _WINDOW, sparse: _CSA, heavy: _HCA}
        bad = [ratio for ratio in ratios if type(ratio) is not int or ratio not in kinds]
        if bad:
            raise config.unsupported("compress_ratios", bad[0], f"0, {sparse}, {heavy}")
        default = [kinds[ratio] for ratio in ratios]
    return config.kinds("layer_types", count, known, default)


def _attention(config: Config, ratio: int | None, sparse: bool = False) -> CompressedAttention:
    head_dim = config.size("head_dim")
    rope = _rope(config, head_dim, ratio is not None)
    index = Selection(
        "tokens",
        heads=config.size("index_n_heads"),
        dim=config.size("index_head_dim"),
        budget=config.size("index_topk"),
        rope=rope,
    )
    return CompressedAttention(
        heads=config.size("num_attention_heads"),
        head_dim=head_dim,
        q_rank=config.size("q_lora_rank"),
        groups=config.size("o_groups"),
        group_rank=config.size("o_lora_rank"),
        rope=rope,
        scale=head_dim**-0.5,
        window=config.size("sliding_window"),
        ratio=ratio,
        overlap=sparse,
        selection=index if sparse else None,
    )


def _rope(config: Config, head_dim: int, compressed: bool) -> Rope:
    """Layers that compress have a theta and a scaling of their own, the others none."""
    rotated = config.size("qk_rope_head_dim", default=min(64, head_dim), limit=head_dim)
    partial = config.number("partial_rotary_factor", default=rotated / head_dim)
    table = dict(config.child("rope_scaling").table or config.child("rope_parameters").table)
    kind = "compress" if compressed else "main"
    if isinstance(table.get(kind), dict):
        table = table[kind]
    elif compressed:
        theta = config.number("compress_rope_theta", default=160_000.0)
        factor = {"attention_factor": 1.0} if table.get("rope_type", table.get("type")) == "yarn" else {}
        table = {**table, "rope_theta": theta, **factor}
    else:
        table = {"rope_theta": config.number("rope_theta", default=10_000.0)}
    own = {
        key: value for key, value in config.table.items() if key not in ("rope_scaling", "rope_parameters")
    }
    changed = Config({**own, "rope_parameters": table}, config.where)
    return read_rope(changed, head_dim, partial=partial, style="interleaved", place="last")


# Before the hub's names, and before those that transformers writes of all but the head.
_ROOTS = ("", "model.")
_LAYER = "layers.{i}."
_ATTENTION = {
    "q_a": "wq_a.weight",
    "q_a_norm": "q_norm.weight",
    "q_b": "wq_b.weight",
    "kv": "wkv.weight",
    "output_a": "wo_a.weight",
    "output_b": "wo_b.weight",
    "sinks": "attn_sink",
}
_COMPRESSOR = {"kv": "wkv.weight", "gate": "wgate.weight", "position": "ape", "norm": "norm.weight"}
_EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}


def _names() -> Mapping[str, Source]:
    attention, ffn = f"{_LAYER}attn.", f"{_LAYER}ffn."
    names = {
        "embedding": _source("embed.weight", "embed_tokens.weight"),
        "final_norm": _source("norm.weight"),
        "lm_head": Source(("head.weight", "lm_head.weight"), ()),
        "attention.norm": _source(f"{_LAYER}attn_norm.weight"),
        "experts.norm": _source(f"{_LAYER}ffn_norm.weight"),
        # transformers 5.24 writes this norm under the name that a compressor's has.
        "attention.kv_norm": _source(f"{attention}kv_norm.weight", f"{attention}norm.weight"),
        "index.q": _source(f"{attention}indexer.wq_b.weight"),
        "index.weights": _source(f"{attention}indexer.weights_proj.weight"),
        "experts.router": _source(f"{ffn}gate.weight"),
        "experts.router.correction_bias": _source(f"{ffn}gate.bias"),
        "experts.router.table": _source(f"{ffn}gate.tid2eid"),
    }
    for ours, hf in _ATTENTION.items():
        names[f"attention.{ours}"] = _source(f"{attention}{hf}")
    for ours, hf in _COMPRESSOR.items():
        names[f"compressor.{ours}"] = _source(f"{attention}compressor.{hf}")
        names[f"index.compressor.{ours}"] = _source(f"{attention}indexer.compressor.{hf}")
    for ours, hf in _EXPERT.items():
        names[f"experts.{ours}"] = _source(f"{ffn}experts.{{e}}.{hf}.weight")
        names[f"shared.{ours}_proj"] = _source(f"{ffn}shared_experts.{hf}.weight")
    # All experts in one tensor, as transformers has them in memory.
    down = names["experts.down"]
    names["experts.down"] = Source((*down.hf, *_source(f"{ffn}experts.down_proj").hf), ())
    names["experts.gate_up"] = _source(f"{ffn}experts.gate_up_proj")
    for one in ("fn", "base", "scale"):
        names[f"attention.residual.{one}"] = _source(f"{_LAYER}hc_attn_{one}")
        names[f"mlp.residual.{one}"] = _source(f"{_LAYER}hc_ffn_{one}")
        names[f"final_residual.{one}"] = _source(f"hc_head_{one}", f"hc_head.hc_{one}")
    return names


def _source(*hf: str) -> Source:
    """hf: names below the model."""
    return Source(tuple(f"{root}{name}" for root in _ROOTS for name in hf), ())


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("DeepseekV4ForCausalLM",),
    reference="DeepseekV4ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="deepseek4",
    names=_names(),
    left_out=dict.fromkeys(("mtp.", "model.mtp."), DRAFTING),
)
