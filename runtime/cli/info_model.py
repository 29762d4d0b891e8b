"""What krasis-info says about a bundle's model: its family, its kinds of layers, its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.units import format_count

_MIXERS = {
    "attention": "attention",
    "latent_attention": "latent attention",
    "compressed_attention": "compressed attention",
    "gated_delta": "linear attention",
    "channel_delta": "linear attention",
    "mamba2": "Mamba-2",
    "short_conv": "short convolution",
}


def model_to_json(spec: ModelSpec) -> dict[str, Any]:
    """The manifest's description, and what is easier to ask of a summary than of it: how many layers there
    are with and without experts, and which kinds of experts and attention.
    """
    description, has_draft, spec = spec.to_json(), spec.layers[-1].drafts, spec.main
    with_experts = spec.expert_layers
    return {
        "family": spec.family,
        "num_layers": len(spec.layers),
        "num_expert_layers": len(with_experts),
        "num_dense_layers": len(spec.layers) - len(with_experts),
        "has_draft_layer": has_draft,
        "num_draft_layers_left_out": max(spec.draft_layers - has_draft, 0),
        "rope_scaling": spec.rope_scaling.to_json(),
        "experts": _counted(_experts, spec),
        "dense_mlps": _counted(_dense, spec),
        "mixers": _counted(_mixer, spec),
        "description": description,
    }


def model_fields(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of the human form. summary: the record of ``info.bundle_to_json``."""
    model, parameters = summary["model"], summary["parameters"]
    description = model["description"]
    layers = f"{model['num_layers']} layers"
    if model["num_dense_layers"]:
        layers += f" ({model['num_dense_layers']} dense, {model['num_expert_layers']} with experts)"
    scaling = model["rope_scaling"]
    context = f"{summary['max_context']:,} positions"
    if scaling:
        context += f" ({scaling['kind']} x{scaling.get('factor', 1):g})"
    draft = model["num_draft_layers_left_out"]
    return [
        ("model", f"{model['family']}, {layers}, hidden {description['hidden']:,}"),
        (
            "parameters",
            f"{format_count(parameters['total'])} total, {format_count(parameters['active'])} a token, "
            f"{format_count(parameters['experts'])} in experts",
        ),
        *(("experts", one["text"]) for one in model["experts"]),
        *(("dense MLP", one["text"]) for one in model["dense_mlps"]),
        *(("attention", one["text"]) for one in model["mixers"]),
        ("vocabulary", f"{description['vocab']:,}{', tied head' if description.get('tied') else ''}"),
        ("context", context),
        *([("drafting", "a layer for multi-token prediction")] if model["has_draft_layer"] else []),
        *([("left out", f"drafting layers: {draft}")] if draft else []),
    ]


def _counted(describe: Callable[[Layer], str | None], spec: ModelSpec) -> list[dict[str, Any]]:
    """What there is of a kind, with the number of layers that have it, most first."""
    counts = Counter(text for layer in spec.layers if (text := describe(layer)) is not None)
    several = len(counts) > 1
    return [
        {"text": f"{text}, in {count} layers" if several else text, "num_layers": count}
        for text, count in counts.most_common()
    ]


def _experts(layer: Layer) -> str | None:
    experts = layer.experts
    if experts is None:
        return None
    router = experts.router
    parts = [f"{experts.count} a layer, top-{router.top_k}, intermediate {experts.intermediate:,}"]
    if router.score != "softmax":
        parts.append(f"{router.score.replace('_', ' ')} router")
    if experts.shared is not None:
        gated = ", gated" if experts.shared_gate else ""
        parts.append(f"shared expert of {experts.shared.intermediate:,}{gated}")
    return ", ".join(parts)


def _dense(layer: Layer) -> str | None:
    return f"intermediate {layer.mlp.intermediate:,}" if isinstance(layer.mlp, GatedMlp) else None


def _mixer(layer: Layer) -> str | None:
    mixer = layer.mixer
    if mixer is None:
        return None
    if not isinstance(mixer, Attention):
        return _MIXERS.get(mixer.KIND, mixer.KIND)
    parts = [f"{mixer.heads} heads, {mixer.kv_heads} KV heads, head size {mixer.head_dim}"]
    if mixer.rope is not None and mixer.rope.dims != mixer.head_dim:
        parts.append(f"{mixer.rope.dims} rotated")
    if mixer.window is not None:
        parts.append(f"window {mixer.window:,}")
    return ", ".join(parts)
