"""The declarative record of a model and its checks; see ``architecture`` for the readers that produce it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.names import shown

SUPPORTED_MODEL_TYPES = ("qwen3_moe",)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Long-context scaling of the rotary embedding.

    kind: ``none``, ``linear`` or ``yarn``. factor: context length over the original. The other fields are
    YaRN's (https://arxiv.org/abs/2309.00071) as transformers' ``_compute_yarn_parameters`` reads them.
    """

    kind: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shapes and constants of a decoder-only mixture-of-experts transformer. Sizes in elements."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    norm_topk_prob: bool
    tie_word_embeddings: bool

    @property
    def qkv_rows(self) -> int:
        """Output features of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def max_context(self) -> int:
        """Tokens of context that the model can be asked for: its positions, stretched by its rope scaling.

        Model cards tell users to add a scaling and to leave ``max_positions`` as it is; YaRN then reaches its
        factor times the original positions, linear scaling its factor times ``max_positions``.
        """
        scaling = self.rope_scaling
        reach = {"yarn": scaling.original_max_positions, "linear": self.max_positions}.get(scaling.kind, 0)
        return min(max(self.max_positions, int(reach * scaling.factor)), _SIZE_LIMITS["max_positions"])

    @property
    def attention_size(self) -> int:
        """Input features of the attention output projection."""
        return self.num_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``from_json`` inverts it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str = "architecture") -> Architecture:
        """Reads ``to_json``'s form. Unknown, missing or ill-typed fields and impossible sizes raise
        FormatError.
        """
        values = _typed_fields(cls, record, where, skip=("rope_scaling",))
        scaling = record.get("rope_scaling")
        if not isinstance(scaling, Mapping):
            raise FormatError("field must be an object", where=f"{where}.rope_scaling", got=shown(scaling))
        values["rope_scaling"] = RopeScaling(**_typed_fields(RopeScaling, scaling, f"{where}.rope_scaling"))
        architecture = cls(**values)
        check_architecture(architecture, where)
        return architecture


# ---- checks ------------------------------------------------------------------------------------------------

_SIZE_LIMITS = {
    "num_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 12,
    "num_experts": 1 << 16,
    "num_experts_per_token": 1 << 16,
    "expert_intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_positions": 1 << 31,
}
_ROPE_KINDS = ("none", "linear", "yarn")
MAX_HEAD_DIM = 256  # of the attention kernels


def check_architecture(architecture: Architecture, where: str) -> None:
    """FormatError for sizes that no model can have, UnsupportedModelError for sound ones that the kernels
    cannot take.
    """
    for name, limit in _SIZE_LIMITS.items():
        value = getattr(architecture, name)
        if not 1 <= value <= limit:
            raise FormatError("size is out of range", where=f"{where}.{name}", got=value, limit=f"1..{limit}")
    if architecture.num_experts_per_token > architecture.num_experts:
        raise FormatError(
            "more experts a token than there are",
            where=f"{where}.num_experts_per_token",
            got=architecture.num_experts_per_token,
            limit=architecture.num_experts,
        )
    if architecture.num_heads % architecture.num_kv_heads:
        raise FormatError(
            "query heads do not divide evenly among key/value heads",
            where=f"{where}.num_heads",
            got=architecture.num_heads,
            limit=f"a multiple of {architecture.num_kv_heads}",
        )
    _check_constants(architecture, where)
    if architecture.model_type not in SUPPORTED_MODEL_TYPES:
        raise unsupported_model_type(architecture.model_type, f"{where}.model_type")
    _check_tiles(architecture, where)


def _check_constants(architecture: Architecture, where: str) -> None:
    scaling = architecture.rope_scaling
    if scaling.kind not in _ROPE_KINDS:
        raise FormatError(
            "unknown rope scaling", where=where, got=shown(scaling.kind), limit=", ".join(_ROPE_KINDS)
        )
    ranges = [
        ("rms_norm_eps", architecture.rms_norm_eps, 0.0, 1.0),
        ("rope_theta", architecture.rope_theta, 1.0, 1e15),
        ("rope_scaling.factor", scaling.factor, 1.0, 1e6),
    ]
    if scaling.kind == "yarn":
        if not 1 <= scaling.original_max_positions <= _SIZE_LIMITS["max_positions"]:
            raise FormatError(
                "size is out of range",
                where=f"{where}.rope_scaling.original_max_positions",
                got=scaling.original_max_positions,
                limit=f"1..{_SIZE_LIMITS['max_positions']}",
            )
        ranges += [
            ("rope_scaling.beta_fast", scaling.beta_fast, 1e-6, 1e6),
            ("rope_scaling.beta_slow", scaling.beta_slow, 1e-6, 1e6),
        ]
        if scaling.attention_factor is not None:
            ranges.append(("rope_scaling.attention_factor", scaling.attention_factor, 1e-3, 1e3))
    for name, value, low, high in ranges:
        if not (math.isfinite(value) and low <= value <= high):
            raise FormatError(
                "number is out of range", where=f"{where}.{name}", got=value, limit=f"{low}..{high}"
            )


def _check_tiles(architecture: Architecture, where: str) -> None:
    rules = (
        ("hidden_size", architecture.hidden_size, 64),
        ("expert_intermediate_size", architecture.expert_intermediate_size, 64),
        ("head_dim", architecture.head_dim, 16),
        ("num_kv_heads * head_dim", architecture.num_kv_heads * architecture.head_dim, 32),
    )
    for name, value, tile in rules:
        if value % tile:
            raise UnsupportedModelError(
                "size is not a multiple of the tile",
                where=f"{where}.{name}",
                got=value,
                limit=f"a multiple of {tile}",
            )
    if architecture.head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            "attention heads are too wide",
            where=f"{where}.head_dim",
            got=architecture.head_dim,
            limit=MAX_HEAD_DIM,
        )


def unsupported_model_type(model_type: object, where: str) -> UnsupportedModelError:
    """The error for a model type that is not among the supported ones, which it names."""
    return UnsupportedModelError(
        "this model type is not supported",
        where=where,
        got=shown(model_type),
        limit="supported model types: " + ", ".join(SUPPORTED_MODEL_TYPES),
    )


# ---- typed fields ------------------------------------------------------------------------------------------


def _typed_fields(
    cls: type[Any], record: Mapping[str, Any], where: str, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of a dataclass out of JSON, each of its declared type; exactly those keys."""
    types = {field.name: str(field.type) for field in fields(cls)}
    unknown = [key for key in record if key not in types]
    if unknown:
        raise FormatError("unknown field", where=where, got=shown(unknown[0]), limit=", ".join(types))
    missing = [name for name in types if name not in record]
    if missing:
        raise FormatError("field is missing", where=where, got=missing[0])
    return {
        name: _typed(record[name], declared, f"{where}.{name}")
        for name, declared in types.items()
        if name not in skip
    }


def _typed(value: Any, declared: str, where: str) -> Any:
    if value is None and declared.endswith("| None"):
        return None
    kind = declared.split(" ")[0]
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise FormatError("field has the wrong type", where=where, got=shown(value), limit=kind)
    if isinstance(value, str) and len(value) > 100:
        raise FormatError("text is too long", where=where, got=shown(value), limit="100 characters")
    return value
