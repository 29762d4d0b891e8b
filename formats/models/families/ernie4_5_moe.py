"""ERNIE 4.5 MoE: neighbouring channels rotated, softmax router with a correction bias, dense first layers."""

from __future__ import annotations

from krasis.formats.models.family import DRAFTING, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    SOFTMAX,
    gguf_attention,
    gguf_experts,
    gguf_layers,
    gguf_model,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, dense_mlp, layers_of, model, num_layers
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import ModelSpec, Norm

NAME = "ernie4_5_moe"
MIN_SUM = 1e-12  # that the weights of the chosen are divided by at least


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("moe_use_aux_free", True)
    config.expect("moe_gate_act", "softmax")
    config.expect("use_bias", False)
    mixer = attention(config, rope={"style": "interleaved", "theta": 500_000.0})
    width = config.size("moe_intermediate_size")
    shared = config.size("moe_num_shared_experts", default=0, least=0)
    router = Router(
        config.size("moe_k"), correction_bias=True, sum_floor=config.number("moe_norm_min", default=MIN_SUM)
    )
    routed = Experts(
        config.size("moe_num_experts"), width, router, shared=GatedMlp(width * shared) if shared else None
    )
    dense = _dense_layers(config)
    layers = layers_of([mixer] * len(dense), dense, dense_mlp(config) if any(dense) else None, routed)
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)), tied=True)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys, "expert_weights_scale")
    keys.expect("expert_gating_func", SOFTMAX, 0)
    keys.expect("interleave_moe_layer_step", 1, 0)
    router = Router(keys.size("expert_used_count"), correction_bias=True, sum_floor=MIN_SUM)
    mixer = gguf_attention(keys, style="interleaved")
    return gguf_model(keys, NAME, gguf_layers(keys, mixer, gguf_experts(keys, router=router)))


def _dense_layers(config: Config) -> list[bool]:
    count = num_layers(config)
    first = config.size("moe_layer_start_index", default=1, least=0)
    last = config.size("moe_layer_end_index", default=-1, least=-1)
    step = config.size("moe_layer_interval", default=1)
    last = count - 1 if last == -1 else last
    return [not (first <= i <= last and (i + 1) % step == 0) for i in range(count)]


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Ernie4_5_MoeForCausalLM",),
    reference="Ernie4_5_MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="ernie4_5-moe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(
        qk_norm=False,
        shared="shared_experts",
        dense=True,
        correction="moe_statics.e_score_correction_bias",
    ),
    left_out={"model.mtp_": DRAFTING},
)
