"""Which layer of a source drafts (multi-token prediction), and where its tensors are.

It is an ordinary layer of the family's kind with attention to all tokens: h' = projection of [norm of the
next token's embedding, norm of the model's last hidden state, behind the model's final norm], the layer, a
norm, and the model's head. Sources may keep copies of embedding and head beside it.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import DraftNames, Source
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import Layer, ModelSpec

_HF, _GGUF = "model.layers.{i}.", "blk.{i}.nextn."
COPIES = (
    "embed_tokens.weight",
    "shared_head.head.weight",
    "nextn.embed_tokens.weight",
    "nextn.shared_head_head.weight",
)
"""The ends of the names of what such a layer shares with the model, which sources may repeat."""


def draft_names() -> DraftNames:
    """Those of a layer behind the last one, as GLM and DeepSeek have it."""
    return DraftNames(_names(f"{_HF}eh_proj", f"{_HF}enorm", f"{_HF}hnorm", f"{_HF}shared_head.norm"))


def mtp_names() -> DraftNames:
    """Those of Qwen's ``mtp``, whose norms the hub keeps about 0."""
    found = _names("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
    norms = {ours: replace(one, transform="add_one") for ours, one in found.items() if ours.endswith("norm")}
    return DraftNames(found | norms, "mtp.layers.0.")


def _names(projection: str, embedding_norm: str, hidden_norm: str, norm: str) -> dict[str, Source]:
    def source(hf: str, gguf: str) -> Source:
        return Source((f"{hf}.weight",), (f"{_GGUF}{gguf}.weight",))

    return {
        "draft.embedding_norm": source(embedding_norm, "enorm"),
        "draft.hidden_norm": source(hidden_norm, "hnorm"),
        "draft.projection": source(projection, "eh_proj"),
        "draft.norm": source(norm, "shared_head_norm"),
    }


def draft_alone(spec: ModelSpec, layer: Layer) -> ModelSpec:
    """The layer that drafts as a model of its own: what it keeps of a sequence is that model's."""
    return replace(spec, layers=(replace(layer, drafts=False),), draft_layers=0)


def with_draft(spec: ModelSpec) -> ModelSpec | None:
    """The model with a layer behind the last that drafts: of the kind of the last one whose attention sees
    all tokens, which has the experts if any has. None for a model without such a layer.
    """
    for layer in reversed(spec.layers):
        mixer = layer.mixer
        sees_all = isinstance(mixer, LatentAttention) or (
            isinstance(mixer, Attention) and mixer.window is None and mixer.chunk is None
        )
        if sees_all:
            return replace(spec, layers=(*spec.layers, replace(layer, drafts=True)))
    return None
