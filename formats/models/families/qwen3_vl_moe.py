"""The language model of Qwen3-VL-MoE: Qwen3-MoE whose rotation knows pictures, which text does not notice."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.families import qwen3_moe
from krasis.formats.models.family import VISION, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.hf_rope import MROPE
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "qwen3_vl_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    qwen3_moe.refuse_features(config)
    mixer = attention(config, qk_norm="head", rope={"ignored": MROPE, "theta": 500_000.0})
    routed = experts(config, softmax_router(config, renormalise=True))
    return model(config, NAME, moe_layers(config, mixer, routed))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. The vision tower is a file of its own."""
    return replace(qwen3_moe.spec_from_gguf(keys), family=NAME)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "qwen3_vl_moe_text"),
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    reference="Qwen3VLMoeForConditionalGeneration",
    spec_from_hf=spec_from_hf,
    gguf="qwen3vlmoe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(root="model.language_model.", transposed=True),
    left_out={"model.visual.": VISION},
    nested=(NAME,),
)
