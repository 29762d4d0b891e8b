"""Where the layers' keys and values lie in the memory of a slot."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import ring_positions
from krasis.runtime.state.row_form import RowForm, row_forms

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A layer's keys [kv_heads, rows, width of a key] from byte ``offset_bytes`` of a slot's keys on, its
    values likewise from ``value_offset_bytes`` of the values on. rows: positions that have room. window: the
    positions that a token sees, None for all; position p then lies at p % rows.
    """

    offset_bytes: int
    kv_heads: int
    key: RowForm
    value_offset_bytes: int
    value: RowForm
    rows: int
    window: int | None = None

    @property
    def keys_end_bytes(self) -> int:
        """One past the keys."""
        return self.offset_bytes + self.kv_heads * self.rows * self.key.num_bytes

    @property
    def values_end_bytes(self) -> int:
        """One past the values."""
        return self.value_offset_bytes + self.kv_heads * self.rows * self.value.num_bytes


def layer_places(spec: ModelSpec, capacity: int, dtype: str) -> tuple[LayerPlace | None, ...]:
    """One layer after the other, aligned for the kernels; None for layers without attention."""
    places: list[LayerPlace | None] = []
    offset = value_offset = 0
    for layer in spec.layers:
        forms = row_forms(layer.mixer, dtype)
        if forms is None:
            places.append(None)
            continue
        kv_heads, key, value = forms
        window = layer.mixer.window if isinstance(layer.mixer, Attention) else None
        rows = capacity if window is None else min(capacity, ring_positions(window))
        place = LayerPlace(offset, kv_heads, key, value_offset, value, rows, window)
        places.append(place)
        offset = align_up(place.keys_end_bytes, ALIGN_BYTES)
        value_offset = align_up(place.values_end_bytes, ALIGN_BYTES)
    return tuple(places)
