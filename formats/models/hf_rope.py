"""Reads rotary embeddings out of a ``config.json``: ``rope_theta`` with ``rope_scaling`` (transformers 4) or
``rope_parameters`` (5), for all layers or by layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.hf import Config
from krasis.formats.models.record import located
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.names import shown

_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_YARN = frozenset(
    {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"}
)
_KEYS = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "yarn": _COMMON | _YARN,
    "llama3": _COMMON | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "proportional": _COMMON | {"factor"},
}
# Positions of images and videos: for text all three are the same.
MROPE = frozenset({"mrope_section", "mrope_interleaved"})


def rope_table(config: Config, layer_kind: str | None = None) -> Config:
    """The table with the rotary embedding's settings. As in transformers, a ``rope_scaling`` that is there
    wins over ``rope_parameters``. layer_kind: whose table is taken where each layer type has one.
    """
    field = "rope_scaling" if config.table.get("rope_scaling") else "rope_parameters"
    table = config.child(field)
    if layer_kind is not None and isinstance(table.table.get(layer_kind), Mapping):
        return table.child(layer_kind)
    return table


def read_rope(
    config: Config,
    head_dim: int,
    *,
    layer_kind: str | None = None,
    kinds: tuple[str, ...] = ("default", "linear", "yarn"),
    theta: float = 10_000.0,
    partial: float = 1.0,
    style: Literal["half", "interleaved"] = "half",
    place: Literal["first", "last"] = "first",
    ignored: frozenset[str] = frozenset(),
) -> Rope:
    """The rotary embedding of heads of ``head_dim`` channels. kinds: those that the family may have. theta,
    partial: the family's defaults. ignored: settings without a meaning for text.

    Raises UnsupportedModelError for other kinds and unknown settings, FormatError for impossible values.
    """
    table = rope_table(config, layer_kind)
    theta = table.number("rope_theta", default=config.number("rope_theta", default=theta))
    partial = table.number(
        "partial_rotary_factor", default=config.number("partial_rotary_factor", default=partial)
    )
    kind = table.table.get("rope_type", table.table.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedModelError(
            "this kind of rope scaling is not supported",
            where=table.path("rope_type"),
            got=shown(kind),
            limit=", ".join(kinds),
        )
    known = _KEYS[kind] | ignored
    unknown = sorted(key for key, value in table.table.items() if key not in known and value is not None)
    if unknown:
        raise UnsupportedModelError(
            f"unknown setting of {kind} rope scaling",
            where=table.where,
            got=shown(unknown[0]),
            limit=", ".join(sorted(known)),
        )
    if not 0 < partial <= 1:
        raise table.unsupported("partial_rotary_factor", partial, "above 0, up to 1")
    with located(table.where):
        return Rope(int(head_dim * partial), theta, style, place, _scaling(config, table, kind))


def _scaling(config: Config, table: Config, kind: str) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", table.number("factor"))
    if kind == "proportional":
        return RopeScaling("proportional", table.number("factor", default=1.0))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            table.number("factor"),
            table.size("original_max_position_embeddings"),
            low_freq_factor=table.number("low_freq_factor"),
            high_freq_factor=table.number("high_freq_factor"),
        )
    return _yarn(config, table)


def _yarn(config: Config, table: Config) -> RopeScaling:
    max_positions = config.size("max_position_embeddings")
    name = "original_max_position_embeddings"
    original = table.size(name, default=max_positions)
    # A top-level field takes precedence in transformers, so it does here.
    original = config.size(name, default=original)
    factor = table.number("factor", default=max_positions / original)
    attention_factor = None
    if table.has("attention_factor"):
        attention_factor = table.number("attention_factor")
    elif table.table.get("mscale") and table.table.get("mscale_all_dim"):
        upper, lower = (yarn_temperature(table, field, factor) for field in ("mscale", "mscale_all_dim"))
        attention_factor = upper / lower if lower else math.nan  # nan is refused with the other ranges
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor,
        # transformers takes its default for 0 as well as for null
        table.number("beta_fast", default=32.0) or 32.0,
        table.number("beta_slow", default=1.0) or 1.0,
        table.flag("truncate", default=True),
    )


def yarn_temperature(table: Config, field: str, factor: float) -> float:
    """0.1 m ln(factor) + 1, YaRN's temperature (eq. 22) with a weight m out of a field; 1 without it."""
    return 0.1 * table.number(field, default=0.0) * math.log(max(factor, 1.0)) + 1.0
