"""Blocks that many families write into ``config.json`` in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from krasis.formats.models.hf import Config
from krasis.formats.models.hf_rope import read_rope, rope_table, yarn_temperature
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.mlps import Activation, Experts, GatedMlp, Router
from krasis.formats.models.spec import Layer, Mixer, Mlp, ModelSpec, Norm

R3_EPSILON = 1e-20  # that sigmoid routers add to the sum of the weights


def num_layers(config: Config) -> int:
    """The number of layers, without those that only draft."""
    return config.size("num_hidden_layers")


def model(
    config: Config,
    family: str,
    layers: Sequence[Layer],
    *,
    norm: Norm | None = None,
    tied: bool = False,
    max_positions: int | None = None,
    **changes: Any,
) -> ModelSpec:
    """The model of these layers. norm: RMS with ``rms_norm_eps`` if left out; tied: the family's default;
    max_positions: where they are not what the config says.
    """
    if max_positions is None:
        config.expect("dual_chunk_attention_config", limit="none")
        max_positions = config.size("max_position_embeddings")
    return ModelSpec(
        family=family,
        hidden=config.size("hidden_size"),
        vocab=config.size("vocab_size"),
        max_positions=max_positions,
        norm=norm or Norm(config.number("rms_norm_eps", default=1e-6)),
        layers=tuple(layers),
        tied=config.flag("tie_word_embeddings", default=tied),
        draft_layers=config.size("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, limit=64),
        **changes,
    )


def one_plus(config: Config) -> Norm:
    """RMS norms whose weights are kept about 0."""
    return Norm(config.number("rms_norm_eps", default=1e-6), offset=1.0)


def attention(config: Config, *, rope: dict[str, Any] | None = None, **changes: Any) -> Attention:
    """Attention by the usual fields. rope: arguments of ``read_rope``. changes: fields of the record; heads,
    kv_heads, head_dim and scale among them replace what the config says.
    """
    heads = changes.pop("heads", None) or config.size("num_attention_heads")
    kv_heads = changes.pop("kv_heads", None) or config.size("num_key_value_heads", default=heads)
    head_dim = changes.pop("head_dim", None)
    if head_dim is None:
        head_dim = config.size("head_dim", default=max(1, config.size("hidden_size") // heads))
    has_rotary = "rotary" in changes
    rotary = changes.pop("rotary") if has_rotary else read_rope(config, head_dim, **(rope or {}))
    scale = changes.pop("scale", None) or head_dim**-0.5
    return Attention(heads, kv_heads, head_dim, rotary, scale, **changes)


def latent(config: Config, *, rope: dict[str, Any] | None = None, **changes: Any) -> LatentAttention:
    """Multi-head latent attention by DeepSeek's fields. rope: arguments of ``read_rope``; ``rotary=None``
    among the changes leaves the rotation out.
    """
    nope, rope_dim = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim", least=0)
    scale = (nope + rope_dim) ** -0.5
    if "rotary" in changes:
        rotary = changes.pop("rotary")
    else:
        style = "interleaved" if config.flag("rope_interleave", default=True) else "half"
        arguments: dict[str, Any] = {"head_dim": rope_dim, "style": style}
        rotary = read_rope(config, **(arguments | (rope or {})))
        if rotary.scaling.kind != "none":
            scale *= yarn_temperature(rope_table(config), "mscale_all_dim", rotary.scaling.factor) ** 2
    return LatentAttention(
        heads=config.size("num_attention_heads"),
        q_rank=config.optional_size("q_lora_rank"),
        kv_rank=config.size("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        value_dim=config.size("v_head_dim"),
        rope=rotary,
        scale=scale,
        bias=config.flag("attention_bias"),
        **changes,
    )


def sigmoid_router(config: Config, **changes: Any) -> Router:
    """A router of sigmoids with a correction bias and groups (DeepSeek-V3's), by the usual fields."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    fields: dict[str, Any] = {
        "score": "sigmoid",
        "renormalise": config.flag("norm_topk_prob", default=True),
        "scale": config.number("routed_scaling_factor", default=1.0),
        "correction_bias": True,
        "groups": config.size("n_group", default=1),
        "top_groups": config.size("topk_group", default=1),
        "sum_epsilon": R3_EPSILON,
    }
    return Router(config.size("num_experts_per_tok"), **fields | changes)


def softmax_router(config: Config, **changes: Any) -> Router:
    """A router of one softmax over all experts."""
    return Router(
        config.size("num_experts_per_tok"),
        **{"renormalise": config.flag("norm_topk_prob")} | changes,
    )


def experts(
    config: Config,
    router: Router,
    *,
    width: str = "moe_intermediate_size",
    activation: Activation | None = None,
    shared_field: str | None = "n_shared_experts",
    **changes: Any,
) -> Experts:
    """Routed experts. width: the field of their size; shared_field: that of the number of shared experts,
    which are one MLP of so many times that size.
    """
    activation = activation or Activation()
    intermediate = config.size(width)
    if shared_field is not None and (count := config.optional_size(shared_field)):
        changes.setdefault("shared", GatedMlp(intermediate * count, activation))
    number = config.size("n_routed_experts", "num_experts", "num_local_experts")
    return Experts(number, intermediate, router, activation, **changes)


def dense_layers(config: Config, first: int = 0) -> list[bool]:
    """Which layers have an MLP in place of experts: by ``mlp_layer_types``, else the first ones. first: the
    family's default of how many.
    """
    count = num_layers(config)
    first = config.size("first_k_dense_replace", default=first, least=0)
    default = ["dense" if i < first else "sparse" for i in range(count)]
    return config.kinds("mlp_layer_types", count, {"dense": True, "sparse": False}, default)


def qwen_dense_layers(config: Config) -> list[bool]:
    """The same by ``mlp_only_layers`` and ``decoder_sparse_step``."""
    step = config.size("decoder_sparse_step", default=1)
    only = config.table.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(layer) is int for layer in only):
        raise config.unsupported("mlp_only_layers", only, "a list of layers")
    alone = set(only)
    return [i in alone or (i + 1) % step != 0 for i in range(num_layers(config))]


def dense_mlp(
    config: Config, name: str = "intermediate_size", activation: Activation | None = None
) -> GatedMlp:
    """The MLP of a layer without experts."""
    return GatedMlp(config.size(name), activation or Activation())


def layers_of(mixers: Sequence[Mixer], dense: Sequence[bool], mlp: Mlp | None, routed: Mlp) -> list[Layer]:
    """One layer a mixer, with the MLP where ``dense`` says so, else with the experts."""
    return [Layer(mixer, mlp if is_dense else routed) for mixer, is_dense in zip(mixers, dense, strict=True)]


def moe_layers(config: Config, mixer: Mixer, routed: Mlp, dense: Sequence[bool] | None = None) -> list[Layer]:
    """Layers that all mix alike. The MLP of dense ones is ``intermediate_size`` wide."""
    flags = [False] * num_layers(config) if dense is None else dense
    return layers_of([mixer] * len(flags), flags, dense_mlp(config) if any(flags) else None, routed)
