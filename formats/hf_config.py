"""Reads Hugging Face ``config.json`` (as transformers 4 and 5 write it) into our architecture record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from krasis.formats.architecture_record import (
    SUPPORTED_MODEL_TYPES,
    Architecture,
    RopeScaling,
    check_architecture,
    unsupported_model_type,
)
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.long_context import dual_chunk_context
from krasis.formats.names import shown
from krasis.formats.quantised_checkpoint import refuse_quantised

_MISSING = object()
_CAUSAL_LM = "Qwen3MoeForCausalLM"
_ROPE_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_KEYS = {
    "default": _ROPE_COMMON_KEYS,
    "linear": _ROPE_COMMON_KEYS | {"factor"},
    "yarn": _ROPE_COMMON_KEYS
    | {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def from_hf_config(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a ``config.json`` describes. where: the file, for messages.

    Raises UnsupportedModelError for another model type or a feature the runtime lacks (naming the field),
    FormatError for missing, ill-typed or impossible fields.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise unsupported_model_type(model_type, f"{where}: model_type")
    _refuse_features(config, where)
    num_heads = _int(config, "num_attention_heads", where)
    hidden_size = _int(config, "hidden_size", where)
    head_dim = _int(config, "head_dim", where, default=hidden_size // max(num_heads, 1))
    max_positions = _int(config, "max_position_embeddings", where)
    rope_theta, rope_scaling = _read_rope(config, max_positions, where)
    max_positions = min(max_positions, dual_chunk_context(config, rope_scaling, where) or max_positions)
    experts_field = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    architecture = Architecture(
        model_type=str(model_type),
        num_layers=_int(config, "num_hidden_layers", where),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_int(config, "num_key_value_heads", where, default=num_heads),
        head_dim=head_dim,
        num_experts=_int(config, experts_field, where),
        num_experts_per_token=_int(config, "num_experts_per_tok", where),
        expert_intermediate_size=_int(config, "moe_intermediate_size", where),
        vocab_size=_int(config, "vocab_size", where),
        max_positions=max_positions,
        rms_norm_eps=_float(config, "rms_norm_eps", where, default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_topk_prob=_bool(config, "norm_topk_prob", where),
        tie_word_embeddings=_bool(config, "tie_word_embeddings", where),
    )
    check_architecture(architecture, where)
    return architecture


def _refuse_features(config: Mapping[str, Any], where: str) -> None:
    """UnsupportedModelError for every setting that would make the model compute something else than we do."""
    refuse_quantised(config, where)
    rules: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        ("hidden_act", ("silu",), "silu"),
        ("attention_bias", (False,), "no biases"),
        ("use_sliding_window", (False,), "full attention"),
        ("mlp_only_layers", ([],), "experts in every layer"),
        ("decoder_sparse_step", (1,), "experts in every layer"),
    )
    for field, allowed, limit in rules:
        value = config.get(field)
        if value is not None and not any(value == good and type(value) is type(good) for good in allowed):
            raise UnsupportedModelError(
                "this feature is not supported", where=f"{where}: {field}", got=shown(value), limit=limit
            )
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types):
        raise UnsupportedModelError(
            "this feature is not supported",
            where=f"{where}: layer_types",
            got=shown(layer_types),
            limit="full_attention",
        )
    classes = config.get("architectures")
    if classes and (not isinstance(classes, list) or _CAUSAL_LM not in classes):
        raise UnsupportedModelError(
            "not a language model with an output head",
            where=f"{where}: architectures",
            got=shown(classes),
            limit=_CAUSAL_LM,
        )


# ---- rotary embedding --------------------------------------------------------------------------------------


def _read_rope(config: Mapping[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling]:
    """(theta, scaling) from ``rope_theta`` + ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5).

    As in transformers, a ``rope_scaling`` that is there wins over ``rope_parameters``, and a theta inside the
    table over the one beside it.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = config.get(field) or {}
    where_table = f"{where}: {field}"
    if not isinstance(table, Mapping):
        raise FormatError("field must be an object", where=where_table, got=shown(table))
    theta = _float(
        table, "rope_theta", where_table, default=_float(config, "rope_theta", where, default=10_000.0)
    )
    rotary = _float(table, "partial_rotary_factor", where_table, default=1.0)
    if rotary != 1.0 or config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            "this feature is not supported",
            where=f"{where_table}: partial_rotary_factor",
            got=rotary,
            limit="1.0",
        )
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UnsupportedModelError(
            "this kind of rope scaling is not supported",
            where=f"{where_table}: rope_type",
            got=shown(kind),
            limit=", ".join(_ROPE_KEYS),
        )
    unknown = sorted(key for key, value in table.items() if key not in _ROPE_KEYS[kind] and value is not None)
    if unknown:
        raise UnsupportedModelError(
            f"unknown setting of {kind} rope scaling",
            where=where_table,
            got=shown(unknown[0]),
            limit=", ".join(sorted(_ROPE_KEYS[kind])),
        )
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_float(table, "factor", where_table))
    return theta, _read_yarn(config, table, max_positions, where_table)


def _read_yarn(
    config: Mapping[str, Any], table: Mapping[str, Any], max_positions: int, where: str
) -> RopeScaling:
    original = _int(table, "original_max_position_embeddings", where, default=max_positions)
    # A top-level field takes precedence in transformers, so it does here.
    original = _int(config, "original_max_position_embeddings", where, default=original)
    if original < 1:
        raise FormatError(
            "size is out of range",
            where=f"{where}: original_max_position_embeddings",
            got=original,
            limit=">= 1",
        )
    factor = _float(table, "factor", where, default=max_positions / original)
    attention_factor = None
    if table.get("attention_factor") is not None:
        attention_factor = _float(table, "attention_factor", where)
    elif table.get("mscale") and table.get("mscale_all_dim"):
        # The quotient of two temperatures, each 0.1 * m * ln(factor) + 1 (YaRN's eq. 22 with a weight m).
        weights = (_float(table, "mscale", where), _float(table, "mscale_all_dim", where))
        upper, lower = (0.1 * weight * math.log(max(factor, 1.0)) + 1.0 for weight in weights)
        attention_factor = upper / lower if lower else math.nan  # nan is refused with the other ranges
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        # transformers takes its default for 0 as well as for null
        beta_fast=_float(table, "beta_fast", where, default=32.0) or 32.0,
        beta_slow=_float(table, "beta_slow", where, default=1.0) or 1.0,
        truncate=_bool(table, "truncate", where, default=True),
    )


# ---- fields ------------------------------------------------------------------------------------------------


def _field(table: Mapping[str, Any], name: str, where: str, default: Any) -> Any:
    """A field's value; null counts as absent, as in transformers."""
    value = table.get(name)
    if value is not None:
        return value
    if default is _MISSING:
        raise FormatError(
            "field is missing", where=f"{where}: {name}", hint="the file may be of another model"
        )
    return default


def _int(table: Mapping[str, Any], name: str, where: str, default: Any = _MISSING) -> int:
    value = _field(table, name, where, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError("field must be an integer", where=f"{where}: {name}", got=shown(value))
    return value


def _float(table: Mapping[str, Any], name: str, where: str, default: Any = _MISSING) -> float:
    value = _field(table, name, where, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise FormatError("field must be a number", where=f"{where}: {name}", got=shown(value))
    return float(value)


def _bool(table: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = _field(table, name, where, default)
    if not isinstance(value, bool):
        raise FormatError("field must be true or false", where=f"{where}: {name}", got=shown(value))
    return value
