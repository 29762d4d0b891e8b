"""Prefixes on disk, one saved-prefix file each, in a folder that outlives the process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, KrasisError, MismatchError, ResourceError
from krasis.runtime.backend import Backend
from krasis.runtime.batch import StateRows
from krasis.runtime.serving.ids import TokenIds, shared_length
from krasis.runtime.serving.prefix_store import Layers
from krasis.runtime.state.kv_file import PrefixFile, bundle_identity, save_prefix

SUFFIX = ".kv"
Export = Callable[[int, int], tuple[StateRows, StateRows]]

logger = logging.getLogger(__name__)


class _Rows:
    """What saving and restoring use of a backend and its state, for state that lies elsewhere."""

    def __init__(self, backend: Any, export: Export | None = None) -> None:
        self.description, self.kv_dtype = backend.description, backend.kv_dtype
        self.capacity = backend.capacity
        self.keeps_windows = bool(getattr(getattr(backend, "state", None), "keeps_windows", False))
        self.keeps_index = bool(getattr(getattr(backend, "state", None), "keeps_index", False))
        self.layers: list[tuple[StateRows, StateRows]] = []
        self.state = self
        self._export = export

    def export(self, _slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``batch.StateStore``."""
        if self._export is None:
            raise ResourceError("there is no state to save")
        return self._export(layer, num_tokens)

    def import_(self, _slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``batch.StateStore``: kept in layers, which come in order, but for those that keep nothing."""
        nothing = keys[:0, :, :0].copy()
        self.layers.extend((nothing, nothing) for _ in range(layer - len(self.layers)))
        self.layers.append((keys.copy(), values.copy()))

    @property
    def backend(self) -> Backend:
        """As the functions that read and write files take it."""
        return cast("Backend", self)


class FileOfPrefix:
    """See ``prefix_store.OnDisk``. A file whose header fits the bundle; its data is checked when read."""

    def __init__(self, path: Path, num_bytes: int, rows: Callable[[], _Rows], bundle: Bundle) -> None:
        self.path, self.num_bytes = path, num_bytes
        self._rows, self._bundle = rows, bundle

    def read(self) -> Layers:
        """See ``prefix_store.OnDisk``."""
        rows = self._rows()
        try:
            with PrefixFile(self.path) as file:
                file.check(self._bundle, rows.backend)
                file.verify()
                file.restore(rows.backend)
        except (FormatError, MismatchError) as error:
            _delete(self.path, error)
            raise
        _touch(self.path)
        return rows.layers


class PrefixFolder:
    """path: an existing folder. max_bytes: of its files; beyond that those used least recently are deleted.

    backend: description, dtype and capacity are those of the caches that prefixes come from and go to.
    Raises ResourceError if the folder cannot be used.
    """

    def __init__(self, path: Path, bundle: Bundle, backend: Any, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._bundle, self._backend = bundle, backend
        # Files that hold windows alone, or keys of an index, are another device's where contexts are kept
        # whole, or without, and not damaged.
        kept = self._rows()
        kind = ("w" if kept.keeps_windows else "") + ("i" if kept.keeps_index else "") + backend.kv_dtype
        self._identity = f"{bundle_identity(bundle)[:16]}-{kind}"
        if not path.is_dir() or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise ResourceError(
                "the folder for prefixes cannot be used",
                where=str(path),
                hint="make it, or name one that can be written to",
            )

    def prefixes(self) -> list[tuple[TokenIds, FileOfPrefix]]:
        """What the folder has for this bundle and cache, the least recently used first; other files are let
        be, and said in the log if they are unsound."""
        found = []
        for path in sorted(self.path.glob(f"*{SUFFIX}"), key=_used_s):
            try:
                with PrefixFile(path) as file:
                    file.check(self._bundle, self._rows().backend)
                    tokens = np.array(file.tokens(self._bundle.spec), dtype=np.int64)
            except (FormatError, MismatchError) as error:
                if path.name.startswith(self._identity):
                    _delete(path, error)
                continue
            except KrasisError as error:
                logger.info("a saved prefix is left out: %s", error)
                continue
            found.append((tokens, self._file(path)))
        return found

    def save(self, tokens: TokenIds, export: Export) -> FileOfPrefix | None:
        """Writes a prefix (export(layer, num_tokens) gives keys and values); None, and why in the log, if
        that fails. One that is there already is only marked as used."""
        path = self.path / self._name(tokens)
        if path.exists():
            _touch(path)
            return self._file(path)
        try:
            save_prefix(path, self._bundle, self._rows(export).backend, tokens.tolist())
        except KrasisError as error:
            logger.warning("a prefix of %d tokens is not saved: %s", len(tokens), error)
            return None
        return self._file(path)

    def prune(self, *, can_be_cut: bool = True) -> int:
        """Deletes this bundle's files that longer ones begin with, if those can be cut anywhere, and
        the oldest beyond max_bytes. Gives how many."""
        kept: list[TokenIds] = []
        total = num_deleted = 0
        for tokens, file in reversed(self.prefixes()):
            is_part = can_be_cut and any(shared_length(tokens, longer) == len(tokens) for longer in kept)
            if is_part or total + file.num_bytes > self.max_bytes:
                num_deleted += _gone(file.path)
                continue
            kept.append(tokens)
            total += file.num_bytes
        return num_deleted

    def _name(self, tokens: TokenIds) -> str:
        """Prefixes of other bundles and of caches of another type have other names."""
        ids = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
        return f"{self._identity}-{xxhash.xxh3_64(ids).hexdigest()}{SUFFIX}"

    def _rows(self, export: Export | None = None) -> _Rows:
        return rows_of(self._backend, export)

    def _file(self, path: Path) -> FileOfPrefix:
        return FileOfPrefix(path, _num_bytes(path), self._rows, self._bundle)


def rows_of(backend: Any, export: Export | None = None) -> _Rows:
    """What saving and restoring take in a backend's place: state that export gives, or that is to come."""
    return _Rows(backend, export)


def export_of(layers: Layers) -> Export:
    """What gives the state in RAM, which is that of all its tokens."""

    def export(layer: int, _num_tokens: int) -> tuple[StateRows, StateRows]:
        return layers[layer]

    return export


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # deleted meanwhile: reading it will say so
        return 0


def _delete(path: Path, error: KrasisError) -> None:
    """A damaged file of ours would stand in the way of a sound one."""
    logger.warning("a damaged prefix is deleted: %s", error)
    _gone(path)


def _gone(path: Path) -> bool:
    """Deletes a file; False, and why in the log, if that is refused."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: %s", path, error)
        return False
    return True


def _used_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        logger.info("%s: %s", path, error)
