"""A prefix on disk: token ids with the keys and values computed for them, to go on from without a prefill.

The file is a safetensors file. ``keys`` and ``values`` [num_layers, num_kv_heads, n, head_dim] in the cache's
own dtype, ``tokens`` I32 [n], and, if a chat was saved, ``conversation`` U8: the JSON of ``/save``. The
metadata names the format, the bundle (digest of its manifest), what computed the cache, and an XXH3-128
digest of each tensor. Both ways the file passes through memory one layer at a time.

A prefix goes back only into the bundle it came from and only into a cache of the same dtype: going on from it
then gives the same bits as never having stopped. Nothing is ever converted on the way.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.manifest import canonical_json
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import (
    LENGTH_BYTES,
    Header,
    TensorInfo,
    parse_header,
    read_header_bytes,
)
from krasis.formats.dtypes import NUMPY_DTYPES
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
from krasis.formats.limits import MAX_FILE_NAME_BYTES, MIB, PAGE_BYTES
from krasis.formats.names import shown
from krasis.runtime.backend import Backend

FORMAT_NAME = "krasis-prefix"
FORMAT_VERSION = "1"
MAX_CONVERSATION_BYTES = 64 * MIB
KV_TENSORS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
_KV_NAMES = {tensor: name for name, tensor in KV_TENSORS.items()}
_NAMES = ("keys", "values", "tokens", "conversation")
_DIGEST_PREFIX = "xxh3_128."
_EMPTY_DIGEST = "0" * 32

logger = logging.getLogger(__name__)


def bundle_identity(bundle: Bundle) -> str:
    """What tells a bundle from every other: the XXH3-128 digest of its manifest, which holds those of all its
    data, and of the architecture where it is run with another.
    """
    digest = xxhash.xxh3_128(bundle.manifest.to_bytes())
    if bundle.spec != bundle.manifest.spec:
        is_flat = bundle.manifest.format_minor == 0  # prefixes saved before the manifest knew more stay good
        record = bundle.architecture.to_json() if is_flat else bundle.spec.to_json()
        digest.update(canonical_json(record))
    return str(digest.hexdigest())


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
    writer = _Writer(path, bundle, backend, tokens, conversation)
    with AtomicFile(path, io=io) as file:
        writer.write(file)
        file.commit()
    logger.info("saved %d tokens, %.2f GB, to %s", len(tokens), writer.num_bytes / 1e9, path)


class _Writer:
    """Lays the file out before anything is written; digests join the header, of known size, at the end."""

    def __init__(
        self, path: Path, bundle: Bundle, backend: Backend, tokens: Sequence[int], conversation: bytes
    ) -> None:
        self._path, self._backend = path, backend
        arch = bundle.architecture
        self._num_tokens, self._num_layers = len(tokens), arch.num_layers
        self._texts = {
            "tokens": np.asarray(tokens, dtype="<i4").tobytes(),
            **({"conversation": conversation} if conversation else {}),
        }
        shape = (arch.num_layers, arch.num_kv_heads, self._num_tokens, arch.head_dim)
        dtype = KV_TENSORS[backend.kv_dtype]
        self._layer_shape = shape[1:]
        self._kv_dtype = NUMPY_DTYPES[dtype]
        self._layer_bytes = math.prod(shape[1:]) * self._kv_dtype.itemsize
        tensors: list[tuple[str, str, tuple[int, ...], int]] = [
            (name, dtype, shape, arch.num_layers * self._layer_bytes) for name in ("keys", "values")
        ]
        tensors.append(("tokens", "I32", (self._num_tokens,), len(self._texts["tokens"])))
        if conversation:
            tensors.append(("conversation", "U8", (len(conversation),), len(conversation)))
        self._entries: dict[str, object] = {}
        self._begin: dict[str, int] = {}
        end = 0
        for name, kind, dims, num_bytes in tensors:
            self._begin[name] = end
            self._entries[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        self._metadata = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "bundle": bundle_identity(bundle),
            "computed_by": backend.description,
        }
        self._header_bytes = len(self._header(dict.fromkeys(self._begin, _EMPTY_DIGEST)))
        self.num_bytes = self._header_bytes + end

    def _header(self, digests: dict[str, str]) -> bytes:
        marked = {_DIGEST_PREFIX + name: digest for name, digest in digests.items()}
        from krasis.formats.bundle.shard_plan import encode_header  # 3 ms, which only a saved prefix needs

        return encode_header({"__metadata__": {**self._metadata, **marked}, **self._entries}, PAGE_BYTES)

    def write(self, file: AtomicFile) -> None:
        """Everything, the header last."""
        file.reserve(self.num_bytes)
        hashes = {name: xxhash.xxh3_128() for name in self._begin}
        for layer in range(self._num_layers):
            pair = self._backend.state.export(0, layer, self._num_tokens)
            for name, rows in zip(("keys", "values"), pair, strict=True):
                if rows.shape != self._layer_shape or rows.dtype != self._kv_dtype:
                    raise FormatError(
                        "the backend gave other keys and values than its cache has",
                        where=str(self._path),
                        got=f"{rows.dtype} {rows.shape}",
                        limit=f"{self._kv_dtype} {self._layer_shape}",
                    )
                data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
                hashes[name].update(data)
                file.write(data, self._header_bytes + self._begin[name] + layer * self._layer_bytes)
        for name, text in self._texts.items():
            hashes[name].update(text)
            file.write(text, self._header_bytes + self._begin[name])
        file.write(self._header({name: str(one.hexdigest()) for name, one in hashes.items()}), 0)


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
        if not set(_NAMES[:3]) <= names <= set(_NAMES):
            raise FormatError(
                "a saved prefix has other tensors",
                where=self._where,
                got=shown(sorted(names)),
                limit=", ".join(_NAMES),
            )
        self._digests = {name: known.get(_DIGEST_PREFIX + name, "") for name in names}
        self.bundle, self.computed_by = known.get("bundle", ""), known.get("computed_by", "")
        self._check_shapes()

    def _check_shapes(self) -> None:
        keys, values, tokens = (self._tensors[name] for name in _NAMES[:3])
        if tokens.dtype != "I32" or len(tokens.shape) != 1 or not tokens.num_bytes:
            raise self._misfit(tokens, "I32 [n]")
        self.num_tokens = tokens.shape[0]
        if keys.dtype not in _KV_NAMES or len(keys.shape) != 4 or keys.shape[2] != self.num_tokens:
            raise self._misfit(keys, f"F16, BF16 or F32 [layers, heads, {self.num_tokens}, head_dim]")
        self.kv_dtype = _KV_NAMES[keys.dtype]
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
                hint=f"open with a KV cache of {self.kv_dtype} (--kv-dtype on the CPU, --gpu-dtype on a GPU)",
            )
        arch = bundle.architecture
        shape = (arch.num_layers, arch.num_kv_heads, self.num_tokens, arch.head_dim)
        if self._tensors["keys"].shape != shape:
            raise self._misfit(self._tensors["keys"], str(list(shape)))
        if self.num_tokens > backend.capacity:
            raise UsageError(
                "the saved prefix is longer than the context",
                where=self._where,
                got=f"{self.num_tokens} tokens",
                limit=f"{backend.capacity} tokens",
                hint="open with a larger context (--ctx)",
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

    def tokens(self, architecture: Architecture) -> list[int]:
        """The ids. FormatError if one is outside the vocabulary."""
        ids = np.frombuffer(self._bytes("tokens"), dtype="<i4")
        if ids.min() < 0 or ids.max() >= architecture.vocab_size:
            raise FormatError(
                "a token id is outside the vocabulary",
                where=f"{self._where}: tokens",
                got=int(ids.min() if ids.min() < 0 else ids.max()),
                limit=architecture.vocab_size,
            )
        return [int(one) for one in ids]

    def conversation(self) -> bytes:
        """The JSON that was saved along; empty if there was none."""
        return self._bytes("conversation") if "conversation" in self._tensors else b""

    def restore(self, backend: Backend) -> None:
        """Copies keys and values into the cache, which must have passed ``check``."""
        for layer, (keys, values) in enumerate(self._layers()):
            backend.state.import_(0, layer, keys, values)

    def _layers(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """[num_kv_heads, n, head_dim] each, layer by layer, in buffers that the next step overwrites."""
        keys = self._tensors["keys"]
        buffers = [np.empty(keys.shape[1:], dtype=NUMPY_DTYPES[keys.dtype]) for _ in range(2)]
        for layer in range(keys.shape[0]):
            for name, rows in zip(("keys", "values"), buffers, strict=True):
                offset = self._tensors[name].offset_bytes + layer * rows.nbytes
                read_into(self._fd, offset, rows.reshape(-1).view(np.uint8), self._where)
            yield buffers[0], buffers[1]

    def _layer_bytes(self) -> int:
        keys = self._tensors["keys"]
        return max(1, keys.num_bytes // max(1, keys.shape[0]))

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
