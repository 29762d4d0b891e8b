"""What makes keys and values of latent attention's latents, as a model has it: apart, and keys the other way
round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from krasis.convert.slices import TensorSlice
from krasis.convert.source_parts import SourcePart
from krasis.formats.models.mixers import LatentAttention


@dataclass(frozen=True, slots=True)
class LatentPart(SourcePart):
    """Keys or values out of one tensor with both, [heads * (nope_dim + value_dim), kv_rank], keys first in
    each head (head_rows: rows of a head).

    ``latent_keys``: [heads * kv_rank, nope_dim], each head's rows turned. ``latent_values``: [heads *
    value_dim, kv_rank].
    """

    nope_dim: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of the model's matrix."""
        heads, columns = self.piece.shape[0] // self.head_rows, self.piece.shape[1]
        return heads * (columns if self.transform == "latent_keys" else self.head_rows - self.nope_dim)

    def restored(self, block: TensorSlice) -> TensorSlice:
        """A block of whole heads as the model has it; float32 of keys that are quantised."""
        heads, columns = block.shape[0] // self.head_rows, block.shape[1]
        if self.transform == "latent_values":
            rows = np.arange(block.shape[0]).reshape(heads, self.head_rows)[:, self.nope_dim :]
            return block.at_rows(rows.reshape(-1))
        values = block.floats() if block.is_float else block.decode()
        turned = values.reshape(heads, self.head_rows, columns)[:, : self.nope_dim].transpose(0, 2, 1)
        raw = np.ascontiguousarray(turned).reshape(-1).view(np.uint8)
        dtype = block.dtype if block.is_float else "F32"
        return replace(block, dtype=dtype, shape=(heads * columns, self.nope_dim), raw=raw)

    def row(self, index: int) -> TensorSlice:
        """One row of the model's matrix."""
        head, row = divmod(index, self.num_rows // (self.piece.shape[0] // self.head_rows))
        first = head * self.head_rows
        return self.restored(self.piece.rows(first, first + self.head_rows)).rows(row, row + 1)


def held_shape(mixer: LatentAttention, transform: str, together: bool) -> tuple[int, ...]:
    """The shape of a source's tensor: of keys and values together, or of one of them by head."""
    if together:
        return mixer.heads * (mixer.nope_dim + mixer.value_dim), mixer.kv_rank
    if transform == "latent_keys":
        return mixer.heads, mixer.kv_rank, mixer.nope_dim
    return mixer.heads, mixer.value_dim, mixer.kv_rank
