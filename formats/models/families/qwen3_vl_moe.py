"""The language model of Qwen3-VL-MoE: Qwen3-MoE whose rotation knows pictures, which text does not notice."""

from __future__ import annotations

from krasis.formats.models.families.qwen3_moe import refuse_features
from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.hf_rope import MROPE
from krasis.formats.models.spec import ModelSpec

NAME = "qwen3_vl_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    refuse_features(config)
    mixer = attention(config, qk_norm="head", rope={"ignored": MROPE, "theta": 500_000.0})
    routed = experts(config, softmax_router(config, renormalise=True))
    return model(config, NAME, moe_layers(config, mixer, routed))


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "qwen3_vl_moe_text"),
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    reference="Qwen3VLMoeForConditionalGeneration",
    spec_from_hf=spec_from_hf,
    gguf="qwen3vlmoe",
    nested=(NAME,),
)
