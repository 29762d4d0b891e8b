"""What configurations say about contexts longer than those a model was trained on, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.names import shown

if TYPE_CHECKING:
    from krasis.formats.models.spec import ModelSpec

DUAL_CHUNKS = "dual_chunk_attention_config"

# YaRN's settings in a GGUF that llama.cpp reads for other architectures only, and what it then uses.
_UNREAD_YARN = (
    ("yarn_ext_factor", (1.0, -1.0)),
    ("yarn_attn_factor", (1.0,)),
    ("yarn_beta_fast", (32.0,)),
    ("yarn_beta_slow", (1.0,)),
    ("yarn_log_multiplier", (0.0,)),
)
_READ_BY_LATENT_ATTENTION = ("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")


def dual_chunk_context(config: Mapping[str, Any], scaling_kind: str, where: str) -> int | None:
    """The positions up to which plain attention is what a model with dual chunk attention was trained with;
    None for a model without. UnsupportedModelError if the configuration does not say, or also scales.
    """
    chunks = config.get(DUAL_CHUNKS)
    if chunks is None:
        return None
    original = chunks.get("original_max_position_embeddings") if isinstance(chunks, Mapping) else None
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise UnsupportedModelError(
            "dual chunk attention is not supported, and the length up to which plain attention serves is "
            "not given",
            where=f"{where}: {DUAL_CHUNKS}.original_max_position_embeddings",
            got=shown(original),
            hint=f"remove {DUAL_CHUNKS} and set max_position_embeddings to the length of the training",
        )
    if scaling_kind != "none":
        raise UnsupportedModelError(
            "dual chunk attention together with rope scaling is not supported",
            where=f"{where}: {DUAL_CHUNKS}",
            got=scaling_kind,
            hint="use the checkpoint's config.json for its original length",
        )
    return original


def hf_context_notes(config: Mapping[str, Any], spec: ModelSpec) -> Iterator[str]:
    """Sentences about what a ``config.json`` says of long contexts."""
    longest = config.get("max_position_embeddings")
    if config.get(DUAL_CHUNKS) is not None and longest != spec.max_positions:
        yield (
            f"dual chunk attention is not supported: contexts end at the {spec.max_positions} "
            f"tokens of the model's training instead of {longest}"
        )
    yield from _stretched(spec)


def gguf_context_notes(metadata: Mapping[str, Any], spec: ModelSpec) -> Iterator[str]:
    """Sentences about what a GGUF says of long contexts."""
    name = metadata.get("general.architecture")
    prefix = f"{name}.rope.scaling."
    read = _READ_BY_LATENT_ATTENTION if f"{name}.attention.kv_lora_rank" in metadata else ()
    unread = [
        key
        for key, usual in _UNREAD_YARN
        if key not in read and metadata.get(prefix + key, usual[0]) not in usual
    ]
    if unread and spec.rope_scaling.kind == "yarn":
        yield (
            f"the GGUF's rope.scaling.{', '.join(unread)} {'are' if len(unread) > 1 else 'is'} not applied: "
            "llama.cpp does not read it for this architecture either (krasis-run --rope-scaling can)"
        )
    yield from _stretched(spec)


def _stretched(spec: ModelSpec) -> Iterator[str]:
    if spec.max_context > spec.max_positions:
        scaling = spec.rope_scaling
        yield (
            f"{'YaRN' if scaling.kind == 'yarn' else scaling.kind} rope scaling by {scaling.factor:g}: "
            f"contexts of up to {spec.max_context} tokens can be opened"
        )
