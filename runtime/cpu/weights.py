"""A bundle's weights as the backends use them: mapped, checked against the architecture, nothing copied but
norms.

Every shape, dtype and layout is checked here, so that kernels can trust their pointers whatever a manifest
says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout, layout_from_id, padded_rows

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
FLOAT_DTYPES = ("BF16", "F16", "F32")
PLAIN = "plain"
ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """A weight in its own precision. data: [n, k] or [n], uint16 bits for BF16. dtype: BF16, F16 or F32."""

    data: Array
    dtype: str

    def rows(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """Rows of a matrix as f32 [len(ids), k]."""
        return to_float32(self.data[ids], self.dtype)

    def rows_into(self, ids: npt.NDArray[np.int64], out: FloatArray) -> None:
        """Writes the rows to out, f32 [len(ids), k], a few at a time: copies of all of them cost ten times as
        much in fresh pages."""
        for begin in range(0, len(ids), ROWS_AT_ONCE):
            raw = self.data[ids[begin : begin + ROWS_AT_ONCE]]
            part = out[begin : begin + ROWS_AT_ONCE]
            if self.dtype == "BF16":
                bits = part.view(np.uint32)
                bits[...] = raw
                bits <<= 16
            else:
                part[...] = raw


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """An INT8-rows weight. codes: int8 [n/32, k/4, 32, 4]; scales: f32 [n]."""

    codes: npt.NDArray[np.int8]
    scales: FloatArray

    @property
    def num_rows(self) -> int:
        """n."""
        return int(self.scales.shape[0])


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norms f32; q_norm and k_norm [head_dim]. experts: uint8 [num_experts, record_bytes]."""

    attention_norm: FloatArray
    qkv: Int8Weight
    q_norm: FloatArray
    k_norm: FloatArray
    output: Int8Weight
    experts_norm: FloatArray
    router: FloatWeight
    experts: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A model with the experts of one tier, whose layout is expert_layout."""

    architecture: Architecture
    embedding: FloatWeight
    layers: tuple[LayerWeights, ...]
    final_norm: FloatArray
    lm_head: Int8Weight
    expert_layout: CpuTileLayout | MarlinLayout


def to_float32(data: Array, dtype: str) -> FloatArray:
    """f32 copy of an array in the bundle's NumPy form (BF16 as uint16 bits)."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def load_weights(bundle: Bundle, tier: str) -> ModelWeights:
    """Maps the dense weights and the experts of tier (``cpu`` or ``gpu``).

    Raises FormatError where the manifest contradicts the architecture, MismatchError if the bundle lacks the
    tier.
    """
    reader = _Reader(bundle)
    architecture = bundle.architecture
    layout = _expert_layout(bundle, tier)
    record_bytes = layout.expert_record(
        architecture.hidden_size, architecture.expert_intermediate_size
    ).record_bytes
    experts_shape = (architecture.num_experts, record_bytes)
    layers = []
    for index in range(architecture.num_layers):
        blob = f"layers.{index}.experts.{tier}"
        layers.append(
            _layer(reader, architecture, index, reader.raw(blob, ("U8",), experts_shape, layout.layout_id))
        )
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    return ModelWeights(
        architecture=architecture,
        embedding=reader.float_weight("embedding", (vocab, hidden)),
        layers=tuple(layers),
        final_norm=reader.float32("final_norm", (hidden,)),
        lm_head=reader.int8_weight("lm_head", padded_rows(vocab), hidden),
        expert_layout=layout,
    )


def _layer(reader: _Reader, architecture: Architecture, index: int, experts: Array) -> LayerWeights:
    name = f"layers.{index}."
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    return LayerWeights(
        attention_norm=reader.float32(name + "attention.norm", (hidden,)),
        qkv=reader.int8_weight(name + "attention.qkv", architecture.qkv_rows, hidden),
        q_norm=reader.float32(name + "attention.q_norm", (head_dim,)),
        k_norm=reader.float32(name + "attention.k_norm", (head_dim,)),
        output=reader.int8_weight(name + "attention.output", hidden, architecture.attention_size),
        experts_norm=reader.float32(name + "experts.norm", (hidden,)),
        router=reader.float_weight(name + "experts.router", (architecture.num_experts, hidden)),
        experts=experts,
    )


def _expert_layout(bundle: Bundle, tier: str) -> CpuTileLayout | MarlinLayout:
    layouts = bundle.manifest.layouts
    where = str(bundle.path)
    if tier not in layouts:
        raise MismatchError(
            f"the bundle has no {tier} experts",
            where=where,
            got=", ".join(sorted(layouts)),
            hint="convert again without leaving that tier out",
        )
    layout = layout_from_id(layouts[tier])
    wanted = CpuTileLayout if tier == "cpu" else MarlinLayout
    if not isinstance(layout, wanted):
        raise FormatError(f"unexpected layout of the {tier} experts", where=where, got=layouts[tier])
    return layout


class _Reader:
    """Maps blobs by name and checks what they are."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def raw(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...], layout: str) -> Array:
        """The mapped array, if it is of one of the dtypes, the shape and the layout."""
        record = self._bundle.blob(name)
        found = (record.dtype, tuple(record.shape), record.layout)
        if record.dtype not in dtypes or found[1:] != (shape, layout):
            raise FormatError(
                "the blob is not what the architecture needs",
                where=f"{self._bundle.path}: {name}",
                got=found,
                limit=("|".join(dtypes), shape, layout),
            )
        return self._bundle.map(name)

    def float_weight(self, name: str, shape: tuple[int, ...]) -> FloatWeight:
        data = self.raw(name, FLOAT_DTYPES, shape, PLAIN)
        return FloatWeight(data, self._bundle.blob(name).dtype)

    def float32(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        weight = self.float_weight(name, shape)
        return to_float32(weight.data, weight.dtype)

    def int8_weight(self, name: str, rows: int, columns: int) -> Int8Weight:
        layout = Int8RowsLayout()
        codes = self.raw(name, ("I8",), layout.codes_shape(rows, columns), layout.layout_id)
        scales = self.raw(f"{name}.scale", ("F32",), (rows,), PLAIN)
        return Int8Weight(codes, scales)
