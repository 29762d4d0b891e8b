"""What a GGUF file holds other than a language model's weights: adapters, vision parts, statistics,
vocabularies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.names import shown

_GIVE_MODEL = "give the GGUF of the model itself"
_VISION = "this GGUF is the vision or audio part (mmproj) of a model, without its language model"
_ADAPTER = "this GGUF is an adapter (LoRA), not a model"
_MERGE = "merge it into its base model (peft's merge_and_unload, llama-export-lora) and give the result"
_STATISTICS = "this GGUF is an importance matrix (imatrix), not a model"
_CONTROL = "this GGUF is a control vector, not a model"

# general.type -> (what, hint)
_TYPES = {
    "adapter": (_ADAPTER, _MERGE),
    "mmproj": (_VISION, _GIVE_MODEL),
    "imatrix": (_STATISTICS, _GIVE_MODEL),
    "controlvector": (_CONTROL, _GIVE_MODEL),
}
# general.architecture -> (what, hint), of files without a type
_ARCHITECTURES = {
    "clip": (_VISION, _GIVE_MODEL),
    "controlvector": (_CONTROL, _GIVE_MODEL),
    "imatrix": (_STATISTICS, _GIVE_MODEL),
}


def check_is_model(metadata: Mapping[str, Any], tensors: Collection[str], where: str) -> None:
    """Raises UnsupportedModelError for a GGUF that is sound but no language model, FormatError for one
    without weights.
    """
    kind, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    found = _TYPES.get(kind) if isinstance(kind, str) else None
    if found is None and isinstance(architecture, str):
        found = _ARCHITECTURES.get(architecture)
    if found is None:
        found = _by_tensors(metadata, tensors)
    if found is not None:
        raise UnsupportedModelError(found[0], where=where, hint=found[1])
    if tensors:
        return
    if "tokenizer.ggml.tokens" in metadata:
        raise FormatError(
            "this GGUF holds a vocabulary only, no weights",
            where=where,
            got=f"{shown(metadata.get('general.name', 'no name'))}, 0 tensors",
            hint=_GIVE_MODEL,
        )
    raise FormatError(
        "this GGUF holds no tensors", where=where, hint="the file may be a part of a split model"
    )


def _by_tensors(metadata: Mapping[str, Any], tensors: Collection[str]) -> tuple[str, str] | None:
    if tensors and all(name.endswith((".lora_a", ".lora_b")) for name in tensors):
        return _ADAPTER, _MERGE
    if tensors and all(name.endswith((".in_sum2", ".counts", ".in_sum")) for name in tensors):
        return _STATISTICS, _GIVE_MODEL
    if any(name.startswith(("v.blk.", "mm.")) for name in tensors) and "token_embd.weight" not in tensors:
        return _VISION, _GIVE_MODEL
    return None
