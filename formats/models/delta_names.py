"""The names of tensors in models of Gated DeltaNet and gated attention, on the hub and in a GGUF.

The hub keeps the weights of all norms but the gated one about 0; a GGUF has one added already.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models import picks
from krasis.formats.models.family import Source
from krasis.formats.models.names import decoder_names

_GGUF = "blk.{i}."


def hybrid_names(*roots: str, dense: bool = False) -> dict[str, Source]:
    """All but those of Gated DeltaNet. roots: before the hub's names, the first that is there counts. dense:
    whether there are layers without experts.
    """
    found: dict[str, Source] = {}
    for root in roots:
        for ours, source in _of_root(root, dense).items():
            known = found.get(ours)
            hf = source.hf if known is None else tuple(dict.fromkeys((*known.hf, *source.hf)))
            found[ours] = replace(source, hf=hf)
    return found


def _of_root(root: str, dense: bool) -> dict[str, Source]:
    names = decoder_names(
        root=root,
        ffn_norm="post_attention_norm",
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        dense=dense,
    )
    for ours, source in names.items():
        if ours.endswith("norm"):
            names[ours] = replace(source, transform="add_one")
    for ours, pick in (("attention.q", picks.gated_query), ("attention.gate", picks.query_gate)):
        names[ours] = replace(names["attention.q"], pick=pick, gguf_pick=pick)
    return names


def delta_names(roots: tuple[str, ...], *, fused: bool) -> dict[str, Source]:
    """Those of Gated DeltaNet. fused: the projections are one by key head, on the hub; else those of q, k
    and v side by side, and in a GGUF the value heads are tiled.
    """

    def source(hf: str, gguf: str, **changes: object) -> Source:
        names = tuple(f"{root}layers.{{i}}.linear_attn.{hf}" for root in roots)
        return Source(names, (f"{_GGUF}{gguf}",), **changes)  # type: ignore[arg-type]

    tiled = not fused
    one = picks.tiled_heads(lambda mixer: 1) if tiled else None
    values = picks.tiled_heads(lambda mixer: mixer.value_dim) if tiled else None
    columns = picks.tiled_heads(lambda mixer: mixer.value_dim, 1) if tiled else None
    names = {
        f"delta.{part}": source(
            "in_proj_qkvz.weight" if fused else "in_proj_qkv.weight",
            "attn_qkv.weight",
            pick=picks.by_key_head(part) if fused else picks.side_by_side(part),
            gguf_pick=picks.side_by_side(part, tiled=tiled),
        )
        for part in ("q", "k", "v")
    }
    if fused:
        z, b, a = (picks.by_key_head(part) for part in "zba")
        names["delta.z"] = source("in_proj_qkvz.weight", "attn_gate.weight", pick=z)
        names["delta.b"] = source("in_proj_ba.weight", "ssm_ba.weight", pick=b, gguf_pick=b)
        names["delta.a"] = source("in_proj_ba.weight", "ssm_ba.weight", pick=a, gguf_pick=a)
    else:
        names["delta.z"] = source("in_proj_z.weight", "attn_gate.weight", gguf_pick=values)
        names["delta.b"] = source("in_proj_b.weight", "ssm_beta.weight", gguf_pick=one)
        names["delta.a"] = source("in_proj_a.weight", "ssm_alpha.weight", gguf_pick=one)
    channels = picks.tiled_channels if tiled else None
    return names | {
        "delta.output": source("out_proj.weight", "ssm_out.weight", gguf_pick=columns),
        "delta.conv": source("conv1d.weight", "ssm_conv1d.weight", gguf_pick=channels),
        "delta.a_log": source("A_log", "ssm_a", gguf_transform="log_of_negative", gguf_pick=one),
        "delta.dt_bias": source("dt_bias", "ssm_dt.bias", gguf_pick=one),
        "delta.gate_norm": source("norm.weight", "ssm_norm.weight"),
    }
