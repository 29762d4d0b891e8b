"""Where layers that overwrite a matrix, or columns of a convolution, have them among a slot's fixed bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from krasis.formats.limits import align_up
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.spec import Mixer, ModelSpec
from krasis.formats.models.state import table_numbers
from krasis.runtime.batch import StateRows
from krasis.runtime.state.kv_store import Bytes
from krasis.runtime.state.row_form import Floats

TILE_COLUMNS = 16  # of a matrix that lie together: the kernels read it in tiles of so many channels of v
_ALIGN_BYTES = 64
_F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class RecurrentPlace:
    """Where a layer's state lies among a slot's fixed bytes, float32: first the matrices [value_heads,
    value_dim/16, key_dim, 16] (of Mamba-2 [heads, head_dim/16, state_dim, 16]), of which some layers have
    none, then the columns of the convolution [conv_width - 1, channels], the oldest first, then num_table
    numbers that a hashed table keeps.
    """

    offset_bytes: int
    matrices: tuple[int, int, int, int]
    columns: tuple[int, int]
    num_table: int = 0

    @property
    def columns_bytes(self) -> int:
        """Where the columns begin, from the layer's offset on."""
        return align_up(int(np.prod(self.matrices)) * _F32_BYTES, _ALIGN_BYTES)

    @property
    def num_bytes(self) -> int:
        """Of all, aligned."""
        return align_up(self.columns_bytes + self.num_after * _F32_BYTES, _ALIGN_BYTES)

    @property
    def num_after(self) -> int:
        """Numbers after the matrices."""
        return int(np.prod(self.columns)) + self.num_table

    @property
    def table_bytes(self) -> int:
        """Where begins what a table keeps, from the layer's offset on."""
        return self.columns_bytes + int(np.prod(self.columns)) * _F32_BYTES

    @property
    def exported_bytes(self) -> int:
        """Of all alone."""
        return (int(np.prod(self.matrices)) + self.num_after) * _F32_BYTES

    def exported(self, fixed: Bytes) -> tuple[Floats, Floats]:
        """The form that a state leaves a store in: [value_heads, n, 16] and [1, conv_width - 1, channels];
        without matrices the latter, and nothing; with a hashed table [1, 1, n] with what that keeps."""
        matrices, columns = self.views(fixed)
        rows = self.after(fixed)[None, None] if self.num_table else columns[None]
        if not matrices.size:
            return rows, rows[:, :, :0]
        return matrices.reshape(len(matrices), -1, TILE_COLUMNS), rows

    def take(self, fixed: Bytes, first: StateRows, second: StateRows) -> None:
        """Writes a state of that form."""
        matrices, rows = (first, second) if math.prod(self.matrices) else (second, first)
        self.views(fixed)[0][...] = matrices.reshape(self.matrices)
        self.after(fixed)[...] = rows.reshape(-1)

    def views(self, fixed: Bytes) -> tuple[Floats, Floats]:
        """Matrices and columns in a slot's fixed bytes, or in a copy of them."""
        begin = self.offset_bytes
        matrices = fixed[begin : begin + int(np.prod(self.matrices)) * _F32_BYTES].view(np.float32)
        columns = self.after(fixed)[: int(np.prod(self.columns))]
        return matrices.reshape(self.matrices), columns.reshape(self.columns)

    def after(self, fixed: Bytes) -> Floats:
        """Columns and what a table keeps, one after the other."""
        middle = self.offset_bytes + self.columns_bytes
        return fixed[middle : middle + self.num_after * _F32_BYTES].view(np.float32)

    def table(self, fixed: Bytes) -> Floats:
        """What a table keeps."""
        return self.after(fixed)[self.num_after - self.num_table :]


def recurrent_places(spec: ModelSpec) -> tuple[RecurrentPlace | None, ...]:
    """Where each layer's state lies among a slot's fixed bytes."""
    places: list[RecurrentPlace | None] = []
    offset = 0
    for layer in spec.layers:
        shapes = state_shapes(layer.mixer)
        if shapes is None:
            places.append(None)
            continue
        place = RecurrentPlace(offset, *shapes, num_table=table_numbers(spec) if layer.ngram else 0)
        places.append(place)
        offset += place.num_bytes
    return tuple(places)


def state_shapes(mixer: Mixer | None) -> tuple[tuple[int, int, int, int], tuple[int, int]] | None:
    """Shapes of a mixer's matrices and columns as ``RecurrentPlace`` has them; None for one without such."""
    if isinstance(mixer, ShortConv):
        return (0, 0, 0, TILE_COLUMNS), (mixer.width - 1, mixer.channels)
    if isinstance(mixer, Mamba2):
        heads, rows, columns = mixer.heads, mixer.state_dim, mixer.head_dim
    elif isinstance(mixer, GatedDelta | ChannelDelta):
        heads, rows, columns = mixer.value_heads, mixer.key_dim, mixer.value_dim
    else:
        return None
    matrices = (heads, -(-columns // TILE_COLUMNS), rows, TILE_COLUMNS)
    return matrices, (mixer.conv_width - 1, mixer.conv_channels)
