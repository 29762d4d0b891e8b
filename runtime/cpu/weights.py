"""A bundle's weights as the backends use them: mapped, checked against the model's description, nothing
copied but norms and other vectors.

Every shape, dtype and layout is checked here, so that kernels can trust their pointers whatever a manifest
says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError, NativeError
from krasis.formats.layouts import ExpertFormat, Int8RowsLayout, expert_format, padded_rows
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.tensor import Tensor
from krasis.formats.models.tensors import layer_tensors, top_tensors

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
FLOAT_DTYPES = ("BF16", "F16", "F32")
PLAIN = "plain"
ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """A weight in its own precision. data: [n, k] or [n], uint16 bits for BF16. dtype: BF16, F16 or F32.
    factor: what its rows are multiplied by when they are looked up.
    """

    data: Array
    dtype: str
    factor: float = 1.0

    def rows(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """Rows of a matrix as f32 [len(ids), k]."""
        found = to_float32(self.data[ids], self.dtype)
        return found if self.factor == 1.0 else found * np.float32(self.factor)

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
        if self.factor != 1.0:
            out *= np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """An INT8-rows weight. codes: int8 [n/32, k/4, 32, 4]; scales: f32 [n]; n is filled up to a multiple of
    32."""

    codes: npt.NDArray[np.int8]
    scales: FloatArray

    @property
    def num_rows(self) -> int:
        """n."""
        return int(self.scales.shape[0])


Weight = FloatWeight | Int8Weight | FloatArray


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. layer: what it is. tensors: by the names that ``layer_tensors`` gives them: an Int8Weight, a
    FloatWeight for plain matrices, f32 for vectors. experts: uint8 [count, record_bytes], None without any.
    """

    layer: Layer
    tensors: Mapping[str, Weight]
    experts: npt.NDArray[np.uint8] | None = None

    def int8(self, name: str) -> Int8Weight:
        """A matrix in INT8 rows."""
        found: Int8Weight = self._of(name, Int8Weight)
        return found

    def matrix(self, name: str) -> FloatWeight:
        """A matrix in its own precision."""
        found: FloatWeight = self._of(name, FloatWeight)
        return found

    def vector(self, name: str) -> FloatArray:
        """A norm, bias or other f32 tensor."""
        found: FloatArray = self._of(name, np.ndarray)
        return found

    def table(self, name: str, limit: int) -> npt.NDArray[np.int32]:
        """Whole numbers, as they are mapped. Raises FormatError unless all are of 0..limit-1."""
        found: npt.NDArray[np.int32] = self._of(name, np.ndarray)
        lowest, highest = int(found.min()), int(found.max())
        if lowest < 0 or highest >= limit:
            got = lowest if lowest < 0 else highest
            raise FormatError("a number is out of range", where=name, got=got, limit=f"0..{limit - 1}")
        return found

    def optional_vector(self, name: str) -> FloatArray | None:
        """As ``vector``; None if the layer has no such tensor."""
        return self.vector(name) if name in self.tensors else None

    def records(self) -> npt.NDArray[np.uint8]:
        """The experts, uint8 [count, record_bytes]."""
        if self.experts is None:
            raise NativeError("the layer has no experts", where="weights")
        return self.experts

    def _of(self, name: str, kind: type[Any]) -> Any:
        found = self.tensors.get(name)
        if not isinstance(found, kind):
            raise NativeError(
                "the layer has no such weight", where=name, got=type(found).__name__, limit=kind.__name__
            )
        return found


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A model with the experts of one tier, whose layout is expert_layout. final_norm: empty where another
    end takes its place, of which ``end`` has the tensors by name. draft: the layer that drafts,
    if that is wanted.
    """

    spec: ModelSpec
    embedding: FloatWeight
    layers: tuple[LayerWeights, ...]
    final_norm: FloatArray
    lm_head: Int8Weight
    expert_layout: ExpertFormat
    end: Mapping[str, Weight] = field(default_factory=dict)
    draft: LayerWeights | None = None

    @property
    def architecture(self) -> Architecture:
        """The flat record, for models whose layers are all alike; UnsupportedModelError for others."""
        from krasis.formats.models.uniform import architecture_of

        return architecture_of(self.spec, "model")


def expert_biases(weights: LayerWeights) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Those of gate, up and down, f32 [experts, rows]; None for experts without."""
    if "experts.down.bias" not in weights.tensors:
        return None
    gate, up, down = (weights.vector(f"experts.{part}.bias") for part in ("gate", "up", "down"))
    return gate, up, down


def to_float32(data: Array, dtype: str) -> FloatArray:
    """f32 copy of an array in the bundle's NumPy form (BF16 as uint16 bits)."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def load_weights(bundle: Bundle, tier: str, *, draft: bool = False) -> ModelWeights:
    """Maps the dense weights and the experts of tier (``cpu`` or ``gpu``). draft: and the layer that drafts,
    which the bundle must have.

    Raises FormatError where the manifest contradicts the model, MismatchError if the bundle lacks the tier.
    """
    reader, spec = _Reader(bundle), bundle.spec
    layout = _expert_layout(bundle, tier)
    before, after = top_tensors(spec)
    top = {tensor.name: reader.read(tensor, tensor.name) for tensor in (*before, *after)}
    embedding, head = top["embedding"], top["lm_head"]
    final_norm = top.get("final_norm", np.empty(0, np.float32))
    if not isinstance(embedding, FloatWeight) or not isinstance(head, Int8Weight):
        raise FormatError("embedding or head are of another kind", where=str(bundle.path))
    wanted = (*spec.layers, *(bundle.manifest.spec.layers[-1:] if draft else ()))
    tensors = {layer: layer_tensors(spec, layer) for layer in dict.fromkeys(wanted)}
    layers = []
    for index, layer in enumerate(wanted):
        prefix = f"layers.{index}."
        found = {
            tensor.name: reader.read(tensor, prefix + tensor.name)
            for tensor in tensors[layer]
            if tensor.store != "experts"
        }
        layers.append(
            LayerWeights(layer, found, _records(reader, spec, layer, layout, f"{prefix}experts.{tier}"))
        )
    drafting = layers.pop() if draft else None
    return ModelWeights(spec, embedding, tuple(layers), final_norm, head, layout, top, drafting)  # type: ignore[arg-type]


def _records(
    reader: _Reader, spec: ModelSpec, layer: Layer, layout: ExpertFormat, blob: str
) -> npt.NDArray[np.uint8] | None:
    experts = layer.experts
    if experts is None:
        return None
    width = experts.width(spec.hidden)
    record_bytes = layout.expert_record(width, experts.intermediate, experts.gated).record_bytes
    return reader.raw(blob, ("U8",), (experts.count, record_bytes), layout.layout_id)


def _expert_layout(bundle: Bundle, tier: str) -> ExpertFormat:
    layouts = bundle.manifest.layouts
    where = str(bundle.path)
    if tier not in layouts:
        raise MismatchError(
            f"the bundle has no {tier} experts",
            where=where,
            got=", ".join(sorted(layouts)),
            hint="convert again without leaving that tier out",
        )
    return expert_format(layouts[tier], "cpu" if tier == "cpu" else "gpu", where)


class _Reader:
    """Maps blobs by name and checks what they are."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def read(self, tensor: Tensor, name: str) -> Weight:
        """A tensor of the model's list as its ``store`` says."""
        if tensor.store == "int8_rows":
            return self.int8_weight(name, padded_rows(tensor.shape[0]), tensor.shape[1])
        if tensor.store == "f32" and tensor.per_expert:  # many, of which a token reads few
            biases: FloatArray = self.raw(name, ("F32",), tensor.shape, PLAIN)
            return biases
        if tensor.store == "f32":
            return np.array(self.raw(name, ("F32",), tensor.shape, PLAIN))
        if tensor.store == "ids":
            numbers: Array = self.raw(name, ("I32",), tensor.shape, PLAIN)
            return numbers
        if tensor.store not in ("plain", "table"):
            raise FormatError("weights of this kind are not read", where=name, got=tensor.store)
        weight = self.float_weight(name, tensor.shape)
        return weight if len(tensor.shape) > 1 else to_float32(weight.data, weight.dtype)

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

    def int8_weight(self, name: str, rows: int, columns: int) -> Int8Weight:
        layout = Int8RowsLayout()
        codes = self.raw(name, ("I8",), layout.codes_shape(rows, columns), layout.layout_id)
        scales = self.raw(f"{name}.scale", ("F32",), (rows,), PLAIN)
        return Int8Weight(codes, scales)
