"""What a saved prefix holds of a model's state, and of which bundle it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from krasis.formats.bundle.manifest import canonical_json
from krasis.formats.bundle.reader import Bundle
from krasis.formats.dtypes import NUMPY_DTYPES
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import table_numbers
from krasis.runtime.backend import Backend
from krasis.runtime.state.recurrent_places import state_shapes
from krasis.runtime.state.row_form import compressed_forms, is_indexed, row_forms

FORMAT_NAME = "krasis-prefix"
FORMAT_VERSION = "1"
KV_TENSORS = {"f16": "F16", "bf16": "BF16", "f32": "F32", "int8": "U8"}
KV_NAMES, FIXED_NAMES, LATENT_NAMES = ("keys", "values"), ("matrices", "columns"), ("latents",)
WINDOW_NAMES = ("window_keys", "window_values")
INDEX_NAMES = ("indexed_latents", "index_keys")
CONV_NAMES = ("conv_columns",)
TABLE_NAMES = ("table_matrices", "table_columns")  # of layers with a hashed table
# Of layers that compress: by windows that overlap, and by others.
OVERLAP_NAMES = ("overlapping_keys", "overlapping_parts")
COMPRESSED_NAMES = ("compressed_keys", "compressed_parts")
GROUPS = (
    KV_NAMES,
    LATENT_NAMES,
    INDEX_NAMES,
    WINDOW_NAMES,
    FIXED_NAMES,
    CONV_NAMES,
    TABLE_NAMES,
    OVERLAP_NAMES,
    COMPRESSED_NAMES,
)
# Groups that have something of each token, or of the last ones: a file has one at least.
BY_TOKEN = (KV_NAMES, LATENT_NAMES, INDEX_NAMES, WINDOW_NAMES, OVERLAP_NAMES, COMPRESSED_NAMES)
DIGEST_PREFIX = "xxh3_128."


def bundle_identity(bundle: Bundle) -> str:
    """What tells a bundle from every other: the XXH3-128 digest of its manifest, which holds those of all its
    data, and of the architecture where it is run with another.
    """
    digest = xxhash.xxh3_128(bundle.manifest.to_bytes())
    if bundle.spec != bundle.manifest.spec.main:
        is_flat = bundle.manifest.format_minor == 0  # prefixes saved before the manifest knew more stay good
        record = bundle.architecture.to_json() if is_flat else bundle.spec.to_json()
        digest.update(canonical_json(record))
    return str(digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that keep something of one shape, in two tensors or in one. dtype: of the tensors. shapes: of
    one layer's part of each, as ``StateStore.export`` gives them; second: of what it gives beside.
    """

    names: tuple[str, ...]
    dtype: str
    layers: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    second: tuple[int, ...] = ()

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype in memory."""
        return NUMPY_DTYPES[self.dtype]


def keeps_windows(backend: Backend) -> bool:
    """Whether of layers with a window a backend keeps no more than that; its prefixes hold it apart."""
    return bool(getattr(backend.state, "keeps_windows", False))


def keeps_index(backend: Backend) -> bool:
    """Whether a backend keeps the keys of an index over tokens; its prefixes hold them."""
    return bool(getattr(backend.state, "keeps_index", False))


def groups_of(
    spec: ModelSpec, kv_dtype: str, num_tokens: int, *, windows: bool = False, index: bool = False
) -> tuple[Group, ...]:
    """What the layers keep after so many tokens: keys and values; latents; latents and the keys of an index
    over them (index: else such layers are as the others); keys and values of the last positions of windows
    (windows: else of all, among the others); of those that overwrite a matrix, it and the last columns of
    the convolution, with a hashed table what that keeps, too; of convolutions alone these; of layers that
    compress keys and what entries are made of, as latents where they do not. Raises UnsupportedModelError
    where layers of a kind are not alike.
    """
    found: dict[tuple[str, ...], Group] = {}
    for number, layer in enumerate(spec.layers):
        if layer.mixer is None:
            continue
        group = _group(layer.mixer, number, kv_dtype, num_tokens, spec, windows, index)
        known = found.get(group.names)
        if known is None:
            found[group.names] = group
            continue
        if known.shapes != group.shapes:
            raise UnsupportedModelError(
                "prefixes are not saved of models whose layers keep keys of several sizes", where=spec.family
            )
        found[group.names] = replace(known, layers=(*known.layers, number))
    return tuple(found[names] for names in GROUPS if names in found)


def _group(
    mixer: object,
    index: int,
    kv_dtype: str,
    num_tokens: int,
    spec: ModelSpec,
    windows: bool,
    keys_of_index: bool,
) -> Group:
    if isinstance(mixer, CompressedAttention):
        return _compressed(mixer, index, kv_dtype, num_tokens)
    forms = row_forms(mixer, kv_dtype) if isinstance(mixer, Attention | LatentAttention) else None
    if isinstance(mixer, Attention) and forms is not None:
        window = mixer.window if windows else None
        rows = num_tokens if window is None else min(num_tokens, window)
        names = KV_NAMES if window is None else WINDOW_NAMES
        shapes = tuple((forms[0], rows, form.width) for form in forms[1:])
        return Group(names, KV_TENSORS[kv_dtype], (index,), shapes)
    if (state := state_shapes(spec.layers[index].mixer)) is not None:
        (heads, tiles, key_dim, width), columns = state
        if not heads:
            return Group(CONV_NAMES, "F32", (index,), ((1, *columns),), (1, columns[0], 0))
        if spec.layers[index].ngram:
            kept = (1, 1, columns[0] * columns[1] + table_numbers(spec))
            return Group(TABLE_NAMES, "F32", (index,), ((heads, tiles * key_dim, width), kept))
        return Group(FIXED_NAMES, "F32", (index,), ((heads, tiles * key_dim, width), (1, *columns)))
    if forms is not None:
        latents = (1, num_tokens, forms[1].width)
        if keys_of_index and is_indexed(*forms[1:]):
            keys = (1, num_tokens, forms[2].width)
            return Group(INDEX_NAMES, KV_TENSORS[kv_dtype], (index,), (latents, keys))
        return Group(LATENT_NAMES, KV_TENSORS[kv_dtype], (index,), (latents,), (1, num_tokens, 0))
    raise UnsupportedModelError("prefixes are not saved of models of this kind", where=spec.family)


def _compressed(mixer: CompressedAttention, index: int, kv_dtype: str, num_tokens: int) -> Group:
    forms = compressed_forms(mixer, kv_dtype)
    keys, parts = ((1, num_tokens, form.width) for form in forms)
    dtype = KV_TENSORS[kv_dtype]
    if mixer.ratio is None:
        return Group(LATENT_NAMES, dtype, (index,), (keys,), parts)
    return Group(OVERLAP_NAMES if mixer.overlap else COMPRESSED_NAMES, dtype, (index,), (keys, parts))
