"""GLM-4.5 to 4.7: sigmoid router, a shared expert, dense first layers, half of each head rotated."""

from __future__ import annotations

from krasis.formats.models.drafting import draft_names
from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_attention,
    gguf_experts,
    gguf_layers,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_layers,
    experts,
    model,
    moe_layers,
    sigmoid_router,
)
from krasis.formats.models.names import CORRECTION, decoder_names
from krasis.formats.models.spec import ModelSpec, Norm

NAME = "glm4_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    mixer = attention(
        config,
        rope={"partial": 0.5},
        bias=config.flag("attention_bias"),
        qk_norm="head" if config.flag("use_qk_norm") else "none",
    )
    routed = experts(config, sigmoid_router(config))
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, moe_layers(config, mixer, routed, dense_layers(config, 1)), norm=norm)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata: biases and norms by their tensors, drafting layers left out."""
    refuse_gguf_features(keys)
    mixer = gguf_attention(
        keys,
        partial=True,
        bias="blk.0.attn_q.bias" in keys.tensors,
        qk_norm="head" if "blk.0.attn_q_norm.weight" in keys.tensors else "none",
    )
    routed = gguf_experts(keys, router=gguf_sigmoid_router(keys))
    return gguf_model(keys, NAME, gguf_layers(keys, mixer, routed))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Glm4MoeForCausalLM",),
    reference="Glm4MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="glm4moe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(
        ffn_norm="post_attention_norm",
        biases=True,
        shared="shared_experts",
        dense=True,
        correction=CORRECTION,
    ),
    drafts=draft_names(),
)
