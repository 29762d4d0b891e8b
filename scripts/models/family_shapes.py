"""Released models of other families than Qwen3-MoE, by their configs, for random models of their shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from krasis.convert.latent_parts import held_shape
from krasis.formats.checkpoints.hf_config import read_hf_config
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.registry import family_of
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import dense_tensors

CONFIGS = Path(__file__).resolve().parents[2] / "tests" / "formats" / "models" / "configs"
NAMES = (
    "glm-4.5-air",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "qwen2-57b-a14b",
    "deepseek-v3",
    "deepseek-v2-lite",
    "glm-4.7-flash",
    "qwen3-next-80b-a3b",
    "qwen3.5-35b-a3b",
)
BUNDLE_NAMES = (
    "gpt-oss-20b",
    "gpt-oss-120b",
    "nemotron-3-nano-30b",
    "glm-5.3-flash",
)  # of which bundles are written, no checkpoints
# What options of the scripts are called in the configs of families, where it differs.
_FIELDS = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}


@dataclass(frozen=True, slots=True)
class FamilyShape:
    """A model by its ``config.json``."""

    config: Mapping[str, Any]

    @classmethod
    def named(cls, name: str) -> Self:
        """One of ``NAMES``, without the layers that only draft and without towers."""
        config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
        if "text_config" in config:
            family = family_of(read_hf_config(config, name))
            config = config["text_config"] | {"architectures": [family.reference]}
        return cls(config | {"num_nextn_predict_layers": 0})

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config["tie_word_embeddings"])

    def changed(self, given: Mapping[str, int]) -> FamilyShape:
        """With other sizes, by the names that Qwen3-MoE's config has for them."""
        config = dict(self.config)
        for name, value in given.items():
            names = _FIELDS.get(name, (name,))
            config[next((one for one in names if one in config), names[0])] = value
        if "layer_types" in config and "num_hidden_layers" in given:
            config["layer_types"] = config["layer_types"][: given["num_hidden_layers"]]
        if "hybrid_override_pattern" in config and "num_hidden_layers" in given:
            config["hybrid_override_pattern"] = config["hybrid_override_pattern"][
                : given["num_hidden_layers"]
            ]
        return FamilyShape(config)


def hub_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The checkpoint's tensors: hub names and shapes, matrices [out, in]; each expert's apart."""
    names = family_of(spec).names
    num_layers = len(spec.layers)
    written = -1
    for layer, tensor in dense_tensors(spec):
        done = num_layers if layer is None and written >= 0 else layer
        if done is not None and done > written:
            yield from _expert_tensors(spec, written)
            written = done
        if tensor.name == "lm_head" and spec.tied:
            continue
        mixer = spec.layers[layer].mixer if layer is not None else None
        if isinstance(mixer, LatentAttention) and tensor.name in ("attention.k_b", "attention.v_b"):
            if tensor.name == "attention.v_b":  # keys and values are in one tensor
                yield names[tensor.name].hf[0].format(i=layer), held_shape(mixer, "", together=True)
            continue
        for ours, shape in tensor.sources():
            source = names[ours]
            pick = source.pick if getattr(mixer, "output_gate", "") != "none" else None
            there = shape if pick is None else (pick(mixer).of, *shape[1:])
            alone = (name for name in source.hf if "language_model" not in name)  # no tower beside it
            yield next(alone, source.hf[0]).format(i=layer), there


def _expert_tensors(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Those of a layer's experts; nothing for a layer without."""
    experts = spec.layers[layer].experts if layer >= 0 else None
    if experts is None:
        return
    names, hidden = family_of(spec).names, spec.hidden
    for expert in range(experts.count):
        for part in ("gate", "up", "down"):
            shape = (experts.intermediate, hidden) if part != "down" else (hidden, experts.intermediate)
            template = next(name for name in names[f"experts.{part}"].hf if "{e}" in name)
            yield template.format(i=layer, e=expert), shape


def spec_of_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a config describes."""
    return read_hf_config(config, "random model")
