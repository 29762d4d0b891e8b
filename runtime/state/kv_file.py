"""A prefix on disk: token ids with the keys and values computed for them, to go on from without a prefill.

The file is a safetensors file. ``keys`` and ``values`` [num_layers, num_kv_heads, n, head_dim] in the cache's
own dtype (in 8 bits U8 [.., head_dim + 4], a row's codes and then their float32 scale), ``tokens`` I32 [n],
and, if a chat was saved, ``conversation`` U8: the JSON of ``/save``. Layers
that overwrite a matrix with each token have it in ``matrices`` [num_layers, heads, rows, 16] and their last
inputs in ``columns`` [num_layers, 1, n, channels], both F32, in place of keys and values; those of latent
attention (MLA) have ``latents`` [num_layers, 1, n, channels], or ``indexed_latents`` of that shape beside
``index_keys`` [num_layers, 1, n, channels] where an index says what is attended to, and those with a window,
where the cache keeps no more than it, their last positions in ``window_keys`` and ``window_values``
[num_layers, num_kv_heads, min(n, window), head_dim].
The metadata names the format, the bundle (digest of its manifest), what computed the cache, and an XXH3-128
digest of each tensor. Both ways the file passes through memory one layer at a time.

A prefix goes back only into the bundle it came from and only into a cache of the same dtype: going on from it
then gives the same bits as never having stopped. Nothing is ever converted on the way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import (
    LENGTH_BYTES,
    Header,
    TensorInfo,
    parse_header,
    read_header_bytes,
)
from krasis.formats.errors import (
    ChecksumError,
    FormatError,
    MismatchError,
    ResourceError,
    UsageError,
    VersionError,
)
from krasis.formats.files.atomic_file import AtomicFile
from krasis.formats.files.file_ops import PARTIAL_SUFFIX, FileOps
from krasis.formats.files.regular_file import open_regular, read_into, read_range
from krasis.formats.limits import MAX_FILE_NAME_BYTES, MIB
from krasis.formats.models.spec import ModelSpec
from krasis.formats.names import shown
from krasis.runtime.backend import Backend
from krasis.runtime.batch import StateRows
from krasis.runtime.state.kv_store import import_layer
from krasis.runtime.state.prefix_parts import (
    BY_TOKEN,
    DIGEST_PREFIX,
    FORMAT_NAME,
    FORMAT_VERSION,
    GROUPS,
    INDEX_NAMES,
    KV_NAMES,
    KV_TENSORS,
    WINDOW_NAMES,
    Group,
    bundle_identity,
    groups_of,
    keeps_index,
    keeps_windows,
)
from krasis.runtime.state.prefix_writer import PrefixWriter

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "KV_TENSORS",
    "PrefixFile",
    "bundle_identity",
    "check_target",
    "is_prefix_file",
    "looks_like_prefix",
    "save_prefix",
]

MAX_CONVERSATION_BYTES = 64 * MIB
_KV_DTYPES = {tensor: name for name, tensor in KV_TENSORS.items()}
_GROUP_NAMES = tuple(name for names in GROUPS for name in names)
_BY_TOKEN = tuple(names[0] for names in BY_TOKEN)
_NAMES = (*KV_NAMES, "tokens", "conversation", *_GROUP_NAMES[len(KV_NAMES) :])

logger = logging.getLogger(__name__)


def is_prefix_file(path: Path) -> bool:
    """Whether a regular file claims to be a saved prefix. Never raises for what it finds in it."""
    try:
        PrefixFile(path).close()
    except FormatError:
        return False
    return True


def check_target(path: Path, bundle: Path | None = None) -> None:
    """UsageError unless a prefix may be written there: into a folder that can be written to, under a name
    that is free or an older one's, and not into the bundle, of which it would be no part.
    """
    where, folder = str(path), path.absolute().parent
    if path.name.endswith(PARTIAL_SUFFIX):
        raise UsageError(
            f"a saved prefix must not be called {PARTIAL_SUFFIX}: so are those that are being written",
            where=where,
            hint="choose another name",
        )
    if len(os.fsencode(path.name + PARTIAL_SUFFIX)) > MAX_FILE_NAME_BYTES:
        raise UsageError("the name to save under is too long", got=f"{len(os.fsencode(path.name))} bytes")
    if not folder.is_dir():
        raise UsageError("there is no such folder to save in", where=where, hint="make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("this folder cannot be written to", where=str(folder), hint="choose another one")
    if bundle is not None and bundle.is_dir() and folder.samefile(bundle):
        raise UsageError(
            "a prefix cannot be saved inside the bundle", where=where, hint="choose another folder"
        )
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_prefix_file(path)):
        raise UsageError(
            "there is another file of this name, and it is no saved prefix",
            where=where,
            hint="choose another name",
        )


def save_prefix(
    path: str | os.PathLike[str],
    bundle: Bundle,
    backend: Backend,
    tokens: Sequence[int],
    *,
    conversation: bytes = b"",
    io: FileOps | None = None,
) -> None:
    """Writes the first len(tokens) positions of the backend's cache; the file appears complete or not at all.

    An older prefix of that name is replaced, anything else is not: UsageError, also for no tokens at all.
    ResourceError if the disk is too small or the system refuses.
    """
    path = Path(path)
    if not tokens:
        raise UsageError("there is nothing to save: no token was computed", where=str(path))
    if len(conversation) > MAX_CONVERSATION_BYTES:
        raise UsageError("the conversation is too long to be saved", where=str(path), got=len(conversation))
    check_target(path, bundle.path)
    writer = PrefixWriter(path, bundle, backend, tokens, conversation)
    with AtomicFile(path, io=io) as file:
        writer.write(file)
        file.commit()
    logger.info("saved %d tokens, %.2f GB, to %s", len(tokens), writer.num_bytes / 1e9, path)


class PrefixFile:
    """An open file whose header was checked: format, version, names, shapes that fit each other. Data is not
    yet read.

    num_tokens, kv_dtype, bundle (its identity), computed_by. Raises FormatError for a file that is not a
    sound saved prefix (VersionError for a newer one), ResourceError if it cannot be read. Close it, or use
    ``with``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._where = str(path)
        self._groups: tuple[Group, ...] = ()
        self._buffers: dict[tuple[str, ...], tuple[StateRows, StateRows]] = {}
        self._fd = open_regular(self.path, follow_links=True)
        try:
            file_bytes = os.fstat(self._fd).st_size
            header = parse_header(
                read_header_bytes(self._fd, file_bytes, self._where), file_bytes, self._where
            )
            self._read_header(header)
        except BaseException:
            self.close()
            raise

    def _read_header(self, header: Header) -> None:
        known = header.metadata
        if known.get("format") != FORMAT_NAME:
            raise FormatError(
                "this is no saved prefix", where=self._where, hint="krasis-run --save-kv writes one"
            )
        if known.get("version") != FORMAT_VERSION:
            raise VersionError(
                "the prefix was saved in another format version",
                where=self._where,
                got=shown(known.get("version")),
                limit=FORMAT_VERSION,
                hint="save it again with this version",
            )
        self._tensors = header.tensors
        names = set(self._tensors)
        needed = {name for group in GROUPS if names & set(group) for name in group} | {"tokens"}
        if not needed <= names <= set(_NAMES) or not names & set(_BY_TOKEN):
            raise FormatError(
                "a saved prefix has other tensors",
                where=self._where,
                got=shown(sorted(names)),
                limit=", ".join(sorted(needed)) if needed - names - {"tokens"} else ", ".join(_NAMES[:4]),
            )
        self._digests = {name: known.get(DIGEST_PREFIX + name, "") for name in names}
        self.bundle, self.computed_by = known.get("bundle", ""), known.get("computed_by", "")
        self._check_shapes()

    def _check_shapes(self) -> None:
        tokens = self._tensors["tokens"]
        if tokens.dtype != "I32" or len(tokens.shape) != 1 or not tokens.num_bytes:
            raise self._misfit(tokens, "I32 [n]")
        self.num_tokens = tokens.shape[0]
        by_token = [name for name in _BY_TOKEN if name in self._tensors]
        self.kv_dtype = _KV_DTYPES.get(self._tensors[by_token[0]].dtype, "")
        for keys in (self._tensors[name] for name in by_token):
            is_short = keys.name == WINDOW_NAMES[0]  # how short is the model's matter
            is_fit = len(keys.shape) == 4 and (is_short or keys.shape[2] == self.num_tokens)
            if not is_fit or _KV_DTYPES.get(keys.dtype) != self.kv_dtype:
                raise self._misfit(keys, f"F16, BF16, F32 or U8 [layers, heads, {self.num_tokens}, head_dim]")
        for names in (KV_NAMES, WINDOW_NAMES):
            if names[0] not in self._tensors:
                continue
            keys, values = (self._tensors[name] for name in names)
            if (values.dtype, values.shape) != (keys.dtype, keys.shape):
                raise self._misfit(values, f"{keys.dtype} {list(keys.shape)}, as the keys")
        text = self._tensors.get("conversation")
        if text is not None and (text.dtype != "U8" or text.num_bytes > MAX_CONVERSATION_BYTES):
            raise self._misfit(text, f"U8, at most {MAX_CONVERSATION_BYTES} bytes")

    def _misfit(self, info: TensorInfo, limit: str) -> FormatError:
        where = f"{self._where}: {info.name}"
        return FormatError(
            "wrong shape or type", where=where, got=f"{info.dtype} {list(info.shape)}", limit=limit
        )

    def check(self, bundle: Bundle, backend: Backend) -> None:
        """Whether this prefix can go into that cache.

        Raises MismatchError for another bundle or dtype, UsageError if it is longer than the context,
        FormatError if its shape contradicts its bundle.
        """
        if self.bundle != bundle_identity(bundle):
            raise MismatchError(
                "the prefix was saved from another bundle, or with another --rope-scaling",
                where=self._where,
                got=f"bundle {shown(self.bundle)}",
                limit=f"{bundle.path}: {bundle_identity(bundle)}",
                hint="open the bundle it was saved from, or compute the prompt anew",
            )
        if self.kv_dtype != backend.kv_dtype:
            raise MismatchError(
                "the prefix was saved from a cache of another precision, and is not converted",
                where=self._where,
                got=self.kv_dtype,
                limit=backend.kv_dtype,
                hint=f"open with a KV cache of {self.kv_dtype} (--kv-dtype, or --gpu-dtype on a GPU)",
            )
        is_short = WINDOW_NAMES[0] in self._tensors
        if is_short and not keeps_windows(backend):
            raise MismatchError(
                "the prefix holds the ends of windows alone, and this device keeps whole contexts",
                where=self._where,
                hint="open it on the CPU (--device cpu), where it was saved, or compute the prompt anew",
            )
        has_index = self._check_index(backend)
        self._groups = groups_of(
            bundle.spec, backend.kv_dtype, self.num_tokens, windows=is_short, index=has_index
        )
        held = {name for group in self._groups for name in group.names}
        if others := set(self._tensors) & set(_GROUP_NAMES) ^ held:
            raise FormatError(
                "a saved prefix has other tensors",
                where=self._where,
                got=", ".join(sorted(others)),
                limit=f"{', '.join(sorted(held))} of this model",
            )
        for group in self._groups:
            for name, shape in zip(group.names, group.shapes, strict=True):
                info, wanted = self._tensors[name], (len(group.layers), *shape)
                if (info.dtype, info.shape) != (group.dtype, wanted):
                    raise self._misfit(info, f"{group.dtype} {list(wanted)}")
        if self.num_tokens > backend.capacity:
            raise UsageError(
                "the saved prefix is longer than the context",
                where=self._where,
                got=f"{self.num_tokens} tokens",
                limit=f"{backend.capacity} tokens",
                hint="open with a larger context (--ctx)",
            )

    def _check_index(self, backend: Backend) -> bool:
        """Whether the prefix holds the keys of an index over tokens, as the cache then does too."""
        has_index = INDEX_NAMES[0] in self._tensors
        if has_index == keeps_index(backend):
            return has_index
        raise MismatchError(
            f"the prefix holds {'' if has_index else 'no '}keys of the model's index, unlike this cache",
            where=self._where,
            hint="open it on the device it was saved on (--device cpu), or compute the prompt anew",
        )

    def verify(self) -> None:
        """Reads everything once. Raises ChecksumError if a byte differs from what was written."""
        layer = np.empty(self._layer_bytes(), dtype=np.uint8)
        for name, info in self._tensors.items():
            found = xxhash.xxh3_128()
            for offset in range(0, info.num_bytes, len(layer)):
                piece = layer[: min(len(layer), info.num_bytes - offset)]
                read_into(self._fd, info.offset_bytes + offset, piece, self._where)
                found.update(piece.data)
            if found.hexdigest() != self._digests[name]:
                raise ChecksumError(
                    "the saved prefix was altered",
                    where=f"{self._where}: {name}",
                    got=found.hexdigest(),
                    limit=shown(self._digests[name]),
                    hint="the file is damaged: compute the prompt anew",
                )

    def tokens(self, model: Architecture | ModelSpec) -> list[int]:
        """The ids. FormatError if one is outside the vocabulary."""
        vocab = model.vocab if isinstance(model, ModelSpec) else model.vocab_size
        ids = np.frombuffer(self._bytes("tokens"), dtype="<i4")
        if ids.min() < 0 or ids.max() >= vocab:
            raise FormatError(
                "a token id is outside the vocabulary",
                where=f"{self._where}: tokens",
                got=int(ids.min() if ids.min() < 0 else ids.max()),
                limit=vocab,
            )
        return [int(one) for one in ids]

    def conversation(self) -> bytes:
        """The JSON that was saved along; empty if there was none."""
        return self._bytes("conversation") if "conversation" in self._tensors else b""

    def restore(self, backend: Backend) -> None:
        """Copies the state into the cache, which must have passed ``check``, in the order of the layers."""
        places = sorted(
            (layer, number, group) for group in self._groups for number, layer in enumerate(group.layers)
        )
        for layer, number, group in places:
            import_layer(backend.state, 0, layer, self._rows(group, number), self.num_tokens)

    def _rows(self, group: Group, number: int) -> tuple[StateRows, StateRows]:
        """Of the layer of that number in the group, in buffers that the next call overwrites."""
        buffers = self._buffers.get(group.names)
        if buffers is None:
            shapes = group.shapes if len(group.shapes) > 1 else (group.shapes[0], group.second)
            first, second = (np.empty(shape, dtype=group.numpy) for shape in shapes)
            buffers = self._buffers[group.names] = first, second
        for name, rows in zip(group.names, buffers, strict=False):
            offset = self._tensors[name].offset_bytes + number * rows.nbytes
            read_into(self._fd, offset, rows.reshape(-1).view(np.uint8), self._where)
        return buffers

    def _layer_bytes(self) -> int:
        tensors = [info for name, info in self._tensors.items() if name in _GROUP_NAMES]
        return max(1, *(info.num_bytes // max(1, info.shape[0]) for info in tensors))

    def _bytes(self, name: str) -> bytes:
        info = self._tensors[name]
        return read_range(self._fd, info.offset_bytes, info.num_bytes, self._where)

    def close(self) -> None:
        """Closes the file. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PrefixFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def looks_like_prefix(path: Path) -> bool:
    """Whether a file begins as safetensors files do, which no JSON text can. False if it cannot be read."""
    try:
        fd = open_regular(path, follow_links=True)
    except (FormatError, ResourceError):
        return False
    try:
        size = os.fstat(fd).st_size
        head = read_range(fd, 0, min(size, LENGTH_BYTES + 1), str(path))
    except (FormatError, ResourceError):
        return False
    finally:
        os.close(fd)
    return (
        head[LENGTH_BYTES:] == b"{" and int.from_bytes(head[:LENGTH_BYTES], "little") <= size - LENGTH_BYTES
    )
