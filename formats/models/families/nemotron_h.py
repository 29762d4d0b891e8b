"""Nemotron-H: layers of one block each: Mamba-2, attention without rotation, MLPs or experts without gate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from krasis.formats.errors import FormatError
from krasis.formats.models import picks
from krasis.formats.models.family import DRAFTING, Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_experts, gguf_model, gguf_sigmoid_router
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, sigmoid_router
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Activation, Experts, GatedMlp
from krasis.formats.models.names import CORRECTION
from krasis.formats.models.recurrent import Mamba2
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "nemotron_h"
_RELU2 = Activation("relu_squared")
_ROOTS, _GGUF = ("backbone.", "model."), "blk.{i}."
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


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata, in which a layer has heads or experts, or neither: then it is Mamba-2.
    llama.cpp knows no least time step.
    """
    count = keys.size("block_count") - keys.size("nextn_predict_layers", default=0, least=0)
    heads, widths = (
        keys.by_layer("attention.head_count_kv", count, int),
        keys.by_layer("feed_forward_length", count, int),
    )
    mamba, routed = Layer(_mamba_from_gguf(keys), None), Layer(None, _experts_from_gguf(keys))
    layers = [
        routed if width else Layer(_attention_from_gguf(keys, kv_heads), None) if kv_heads else mamba
        for kv_heads, width in zip(heads, widths, strict=True)
    ]
    eps = keys.number("attention.layer_norm_epsilon", default=1e-5)
    return gguf_model(keys, NAME, layers, Norm(keys.number("attention.layer_norm_rms_epsilon", default=eps)))


def _mamba_from_gguf(keys: Keys) -> Mamba2:
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        raise FormatError(
            "heads do not divide evenly", where=keys.path("ssm.inner_size"), got=inner, limit=heads
        )
    return Mamba2(
        heads=heads,
        head_dim=inner // heads,
        state_dim=keys.size("ssm.state_size"),
        groups=keys.size("ssm.group_count"),
        conv_width=keys.size("ssm.conv_kernel"),
        conv_bias=any(name.endswith("ssm_conv1d.bias") for name in keys.tensors),
    )


def _attention_from_gguf(keys: Keys, kv_heads: int) -> Attention:
    dim = keys.size("attention.key_length")
    has_bias = any(name.endswith("attn_q.bias") for name in keys.tensors)
    heads = keys.size("attention.head_count")
    return Attention(heads, kv_heads, dim, None, dim**-0.5, bias=has_bias, output_bias=has_bias)


def _experts_from_gguf(keys: Keys) -> Experts:
    shared = keys.size("expert_shared_feed_forward_length", default=0, least=0)
    return gguf_experts(
        keys,
        router=gguf_sigmoid_router(keys),
        activation=_RELU2,
        shared=GatedMlp(shared, _RELU2) if shared else None,
        latent=keys.size("moe_latent_size", default=0, least=0) or None,
    )


def _names() -> dict[str, Source]:
    def source(hf: str, gguf: str, **changes: Any) -> Source:
        names = tuple(f"{root}layers.{{i}}.{hf}" for root in _ROOTS)
        return Source(names, (f"{_GGUF}{gguf}",), **changes)

    names = {
        "embedding": Source(tuple(f"{root}embeddings.weight" for root in _ROOTS), ("token_embd.weight",)),
        "final_norm": Source(tuple(f"{root}norm_f.weight" for root in _ROOTS), ("output_norm.weight",)),
        "lm_head": Source(("lm_head.weight",), ("output.weight",)),
        "attention.output": source("mixer.o_proj.weight", "attn_output.weight"),
        "attention.output.bias": source("mixer.o_proj.bias", "attn_output.bias"),
        "experts.router": source("mixer.gate.weight", "ffn_gate_inp.weight"),
        "experts.router.correction_bias": source(f"mixer.{CORRECTION}", "exp_probs_b.bias"),
        "experts.latent_input": source("mixer.fc1_latent_proj.weight", "ffn_latent_down.weight"),
        "experts.latent_output": source("mixer.fc2_latent_proj.weight", "ffn_latent_up.weight"),
    }
    for block in ("attention", "mlp", "experts"):
        names[f"{block}.norm"] = source("norm.weight", "attn_norm.weight")
    for part, kind in itertools.product("qkv", ("weight", "bias")):
        ours = f"attention.{part}" + (".bias" if kind == "bias" else "")
        names[ours] = source(f"mixer.{part}_proj.{kind}", f"attn_{part}.{kind}")
    for part in ("up", "down"):
        names[f"mlp.{part}_proj"] = source(f"mixer.{part}_proj.weight", f"ffn_{part}.weight")
        names[f"mlp.{part}_proj.bias"] = source(f"mixer.{part}_proj.bias", f"ffn_{part}.bias")
        shared = source(f"mixer.shared_experts.{part}_proj.weight", f"ffn_{part}_shexp.weight")
        names[f"shared.{part}_proj"] = shared
        single = source(f"mixer.experts.{{e}}.{part}_proj.weight", f"ffn_{part}_exps.weight")
        stacked = source(f"mixer.experts.{part}_proj", "").hf
        names[f"experts.{part}"] = Source((*single.hf, *stacked), single.gguf)
    return names | _mamba_names(source)


def _mamba_names(source: Callable[..., Source]) -> dict[str, Source]:
    whole, steps = picks.mamba_input, picks.mamba_steps
    return {
        "mamba.input": source("mixer.in_proj.weight", "ssm_in.weight", pick=whole, gguf_pick=whole),
        "mamba.dt": source("mixer.in_proj.weight", "ssm_in.weight", pick=steps, gguf_pick=steps),
        "mamba.output": source("mixer.out_proj.weight", "ssm_out.weight"),
        "mamba.conv": source("mixer.conv1d.weight", "ssm_conv1d.weight"),
        "mamba.conv.bias": source("mixer.conv1d.bias", "ssm_conv1d.bias"),
        "mamba.a_log": source("mixer.A_log", "ssm_a", gguf_transform="log_of_negative"),
        "mamba.d": source("mixer.D", "ssm_d"),
        "mamba.dt_bias": source("mixer.dt_bias", "ssm_dt.bias"),
        "mamba.gate_norm": source("mixer.norm.weight", "ssm_norm.weight"),
    }


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("NemotronHForCausalLM",),
    reference="NemotronHForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="nemotron_h_moe",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
    left_out={"mtp.": DRAFTING},
)
