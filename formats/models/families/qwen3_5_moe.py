"""Qwen3.5 and 3.6 MoE: Qwen3-Next with projections apart and weights that are always renormalised."""

from __future__ import annotations

from krasis.formats.models.delta_names import delta_names, hybrid_names
from krasis.formats.models.drafting import mtp_names
from krasis.formats.models.families.qwen3_next import (
    gated_shared_experts,
    hybrid_from_gguf,
    hybrid_mixers,
)
from krasis.formats.models.family import DRAFTING, VISION, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import layers_of, model
from krasis.formats.models.spec import ModelSpec

NAME = "qwen3_5_moe"
ROOTS = ("model.language_model.", "model.")  # beside a vision tower, or alone


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("norm_topk_prob", True)
    config.expect("mlp_only_layers", [])
    mixers = hybrid_mixers(config)
    layers = layers_of(mixers, [False] * len(mixers), None, gated_shared_experts(config))
    return model(config, NAME, layers)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. The vision tower is a file of its own."""
    return hybrid_from_gguf(keys, NAME)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "qwen3_5_moe_text"),
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    reference="Qwen3_5MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen35moe",
    spec_from_gguf=spec_from_gguf,
    names=hybrid_names(*ROOTS) | delta_names(ROOTS, fused=False),
    left_out={"mtp.": DRAFTING, "model.visual.": VISION},
    nested=(NAME,),
    drafts=mtp_names(),
)
