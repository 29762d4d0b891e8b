"""How one position's key or value lies in a cache: floats, or codes of 8 bits with their scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.spec import Mixer
from krasis.runtime.batch import StateRows

Floats = npt.NDArray[np.float32]
KV_NUMPY: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32, "int8": np.uint8}
"""What caches are made of, by the names of their types."""
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class RowForm:
    """parts: channels that have a scale of their own, in order; ``int8`` rows are all codes, then a float32
    scale of each part (its largest magnitude / 127)."""

    parts: tuple[int, ...]
    dtype: str

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """Of the elements of a row; bytes for ``int8``."""
        return np.dtype(KV_NUMPY[self.dtype])

    @property
    def width(self) -> int:
        """Elements of a row."""
        return sum(self.parts) + (len(self.parts) * _SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return self.width * self.numpy.itemsize

    def kept(self, x: Floats) -> StateRows:
        """Rows [.., width] of floats [.., channels]."""
        if self.dtype != "int8":
            return x.astype(self.numpy)
        if not self.parts:
            return np.empty((*x.shape[:-1], 0), np.uint8)
        codes, scales = [], []
        for part in np.split(x.astype(np.float32), np.cumsum(self.parts)[:-1], axis=-1):
            scale = np.abs(part).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
            safe = np.where(scale == 0, np.float32(1), scale)
            # What is no number is in the scale, as the kernels have it.
            quotients = np.nan_to_num(np.rint(part / safe), nan=127, posinf=127, neginf=-127)
            codes.append(np.clip(quotients, -127, 127).astype(np.int8).view(np.uint8))
            scales.append(np.ascontiguousarray(scale).view(np.uint8))
        return np.concatenate([*codes, *scales], axis=-1)

    def floats(self, rows: StateRows) -> StateRows:
        """[.., channels] of rows [.., width]: float32 of codes, floats as they are."""
        if self.dtype != "int8" or not self.parts:
            return rows
        channels = sum(self.parts)
        codes = rows[..., :channels].view(np.int8).astype(np.float32)
        scales = np.ascontiguousarray(rows[..., channels:]).view(np.float32)
        return codes * np.repeat(scales, self.parts, axis=-1)

    def part(self, rows: StateRows, number: int) -> Floats:
        """float32 [.., channels] of one part of rows [.., width]."""
        begin = sum(self.parts[:number])
        own = rows[..., begin : begin + self.parts[number]]
        if self.dtype != "int8":
            return own.astype(np.float32)
        at = self._scale_place(number)
        scales = np.ascontiguousarray(rows[..., at : at + _SCALE_BYTES]).view(np.float32)
        return np.ascontiguousarray(own).view(np.int8).astype(np.float32) * scales

    def put_part(self, rows: StateRows, number: int, x: Floats) -> None:
        """Writes floats [.., channels] in the place of one part of rows [.., width]; the others stay."""
        kept, channels = RowForm((self.parts[number],), self.dtype).kept(x), self.parts[number]
        begin = sum(self.parts[:number])
        rows[..., begin : begin + channels] = kept[..., :channels]
        if self.dtype == "int8":
            at = self._scale_place(number)
            rows[..., at : at + _SCALE_BYTES] = kept[..., channels:]

    def _scale_place(self, number: int) -> int:
        return sum(self.parts) + number * _SCALE_BYTES


def is_indexed(key: RowForm, value: RowForm) -> bool:
    """Whether what is kept beside a latent is the key of an index."""
    return len(key.parts) > 1 and bool(value.parts)


def row_forms(mixer: Mixer | None, dtype: str) -> tuple[int, RowForm, RowForm] | None:
    """(heads, a key, a value) that a mixer keeps of a token; where keys hold the values, the value is the key
    of an index, what is compressed later, or has no channels."""
    if isinstance(mixer, Attention):
        form = RowForm((mixer.head_dim,), dtype)
        return mixer.kv_heads, form, form
    if isinstance(mixer, CompressedAttention):
        return 1, *compressed_forms(mixer, dtype)
    if isinstance(mixer, LatentAttention):
        return 1, RowForm((mixer.kv_rank, mixer.rope_dim), dtype), RowForm(mixer.index_parts, dtype)
    return None


def compressed_forms(mixer: CompressedAttention, dtype: str) -> tuple[RowForm, RowForm]:
    """A key, and what entries are made of."""
    return RowForm((mixer.head_dim,), dtype), RowForm(mixer.kept_parts, dtype)
