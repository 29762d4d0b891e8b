"""The names of latent attention's tensors (MLA), which all families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from krasis.formats.models.family import Source
from krasis.formats.models.names import CORRECTION, decoder_names

_HF, _GGUF = "self_attn.", "blk.{i}."
_PARTS = {
    "q": ("q_proj", "attn_q"),
    "q_a": ("q_a_proj", "attn_q_a"),
    "q_a_norm": ("q_a_layernorm", "attn_q_a_norm"),
    "q_b": ("q_b_proj", "attn_q_b"),
    "kv_a": ("kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    "kv_a_norm": ("kv_a_layernorm", "attn_kv_a_norm"),
    "output": ("o_proj", "attn_output"),
}
_INDEX = {
    "index.q": ("wq_b.weight", "attn_q_b.weight"),
    "index.k": ("wk.weight", "attn_k.weight"),
    "index.k_norm": ("k_norm.weight", "k_norm.weight"),
    "index.k_norm.bias": ("k_norm.bias", "k_norm.bias"),
    "index.weights": ("weights_proj.weight", "proj.weight"),
}
TOGETHER = "kv_b"
"""In the names of tensors that hold keys and values of a head together, as the hub does and old GGUFs do."""


def latent_decoder_names(
    *, correction: bool = True, nested: str | None = None, **changes: Any
) -> Mapping[str, Source]:
    """Sources by bundle tensor or part of a decoder of latent attention, dense first layers, and experts with
    shared ones beside them. correction: whether routers have a correction bias. nested: what else stands
    before the hub's names, in models of pictures and text. changes: other arguments of ``decoder_names``.
    """
    names = decoder_names(
        qk_norm=False,
        shared="shared_experts",
        dense=True,
        correction=CORRECTION if correction else None,
        **changes,
    )
    names = {ours: source for ours, source in names.items() if ours not in ("attention.k", "attention.v")}
    layer = f"model.layers.{{i}}.{_HF}"
    for ours, (hf, gguf) in _PARTS.items():
        names[f"attention.{ours}"] = Source((f"{layer}{hf}.weight",), (f"{_GGUF}{gguf}.weight",))
    for ours in ("q_a", "kv_a", "output"):
        hf, gguf = _PARTS[ours]
        names[f"attention.{ours}.bias"] = Source((f"{layer}{hf}.bias",), (f"{_GGUF}{gguf}.bias",))
    for ours, transform in (("k_b", "latent_keys"), ("v_b", "latent_values")):
        names[f"attention.{ours}"] = Source(
            (f"{layer}{TOGETHER}_proj.weight",),
            (f"{_GGUF}attn_{ours}.weight", f"{_GGUF}attn_{TOGETHER}.weight"),
            transform=transform,  # type: ignore[arg-type]
            gguf_transform=transform,  # type: ignore[arg-type]
        )
    for ours, (hf, gguf) in _INDEX.items():
        names[ours] = Source((f"{layer}indexer.{hf}",), (f"{_GGUF}indexer.{gguf}",))
    if nested is None:
        return names
    return {
        ours: replace(source, hf=(*source.hf, *(f"{nested}{name}" for name in source.hf)))
        for ours, source in names.items()
    }
