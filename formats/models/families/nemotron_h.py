"""Nemotron-H: layers of one block each, Mamba-2, attention without rotation, MLPs or experts."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, sigmoid_router
from krasis.formats.models.mlps import Activation, Experts, GatedMlp
from krasis.formats.models.recurrent import Mamba2
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "nemotron_h"
_RELU2 = Activation("relu_squared")
_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("mlp_hidden_act", "relu2")
    config.expect("mamba_hidden_act", "silu")
    config.expect("sliding_window", 0)
    config.expect("use_bias", False)
    kinds = _kinds(config)
    mamba, routed = Layer(_mamba(config), None), Layer(None, _experts(config)) if "moe" in kinds else None
    bias = config.flag("attention_bias")
    full = Layer(attention(config, rotary=None, bias=bias, output_bias=bias), None)
    mlp = GatedMlp(config.size("intermediate_size"), _RELU2, config.flag("mlp_bias"))
    known = {"mamba": mamba, "linear_attention": mamba, "moe": routed, "mlp": Layer(None, mlp)}
    known |= {"attention": full, "full_attention": full}
    table = Config({"layers_block_type": kinds}, config.where)
    layers = table.kinds("layers_block_type", len(kinds), known, ())
    norm = Norm(config.number("layer_norm_epsilon", "norm_eps", default=1e-5))
    return model(config, NAME, layers, norm=norm)


def _kinds(config: Config) -> list[str]:
    """What each layer is, by a list of names or a pattern of letters."""
    names = config.table.get("layers_block_type") or config.table.get("layer_types")
    pattern = config.table.get("hybrid_override_pattern")
    if names is None and isinstance(pattern, str):
        names = [_LETTERS.get(letter, letter) for letter in pattern[:100_000]]
    if not isinstance(names, list) or not names:
        raise config.unsupported("hybrid_override_pattern", names, "one letter a layer")
    return names


def _mamba(config: Config) -> Mamba2:
    return Mamba2(
        heads=config.size("mamba_num_heads"),
        head_dim=config.size("mamba_head_dim"),
        state_dim=config.size("ssm_state_size"),
        groups=config.size("n_groups", "mamba_n_groups", default=8),
        conv_width=config.size("conv_kernel", "mamba_d_conv", default=4, limit=64),
        conv_bias=config.flag("use_conv_bias", default=True),
        bias=config.flag("mamba_proj_bias"),
        min_step=config.number("time_step_min", default=0.001),
    )


def _experts(config: Config) -> Experts:
    count = config.size("n_shared_experts", default=1, least=0)
    width = config.size("moe_shared_expert_intermediate_size", "moe_intermediate_size")
    return Experts(
        config.size("n_routed_experts"),
        config.size("moe_intermediate_size"),
        sigmoid_router(config),
        _RELU2,
        shared=GatedMlp(width * count, _RELU2) if count else None,
        latent=config.optional_size("moe_latent_size"),
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("NemotronHForCausalLM",),
    reference="NemotronHForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="nemotron_h_moe",
)
