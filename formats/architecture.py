"""One declarative record of a model, from a Hugging Face ``config.json``; the runtime's loop reads nothing else.

A new family adds an entry to ``SUPPORTED`` and a function from its config to this record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from krasis.formats.errors import FormatError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Long-context scaling of the rotary embedding.

    kind: ``none``, ``linear`` or ``yarn``. factor: context length over the original. The other fields are YaRN's
    (https://arxiv.org/abs/2309.00071) as transformers' ``_compute_yarn_parameters`` reads them.
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
    def attention_size(self) -> int:
        """Input features of the attention output projection."""
        return self.num_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``from_json`` inverts it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str = "architecture") -> Architecture:
        """Reads ``to_json``'s form. Unknown, missing or ill-typed fields and impossible sizes raise FormatError."""
        values = _typed_fields(cls, record, where, skip=("rope_scaling",))
        scaling = record.get("rope_scaling")
        if not isinstance(scaling, Mapping):
            raise FormatError("field must be an object", where=f"{where}.rope_scaling", got=scaling)
        values["rope_scaling"] = RopeScaling(**_typed_fields(RopeScaling, scaling, f"{where}.rope_scaling"))
        architecture = cls(**values)
        check_architecture(architecture, where)
        return architecture
