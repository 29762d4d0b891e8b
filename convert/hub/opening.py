"""Opens models on the hub for a conversion that downloads them piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krasis.convert.hub.download import download, fetch_model
from krasis.convert.hub.fetcher import Fetcher
from krasis.convert.hub.remote import RemoteFile
from krasis.convert.hub.spans import Spans
from krasis.convert.hub.store import SourceStore, sources_path
from krasis.convert.hub.streamed import StreamedSources
from krasis.convert.progress import Reporter
from krasis.formats.checkpoints.gguf_header import gguf_header_bytes
from krasis.formats.checkpoints.safetensors import LENGTH_BYTES
from krasis.formats.errors import FormatError, UsageError
from krasis.formats.files.atomic_file import AtomicFile
from krasis.formats.hub.name import HubName
from krasis.formats.hub.needed import Needed, needed_files
from krasis.formats.hub.repository import HubFile, Repository, is_offline
from krasis.formats.limits import MAX_HEADER_BYTES
from krasis.formats.units import format_bytes

_FIRST_BYTES = 1 << 20  # of each file: most headers are shorter


def open_streamed(
    inputs: Sequence[Path | HubName], out: Path, reporter: Reporter, *, restart: bool
) -> tuple[list[Path], StreamedSources | None]:
    """Each input's path, and the sources of those that lie on the hub. None if all of them are in its cache.

    Brings the text files and the headers. Goes on with the commits that an earlier run began with. Raises
    UsageError for inputs on the disk only, and as ``hub_errors``.
    """
    if not any(isinstance(one, HubName) for one in inputs):
        raise UsageError(
            "--drop-sources is for models named on the hub", hint="the user's own files are never removed"
        )
    if is_offline():
        return [fetch_model(one, reporter) if isinstance(one, HubName) else one for one in inputs], None
    store = SourceStore(sources_path(out))
    try:
        if restart:
            store.clear()
        return _open(inputs, store, reporter)
    except BaseException:
        if store.header is None:
            store.remove()
        store.close()
        raise


def _open(
    inputs: Sequence[Path | HubName], store: SourceStore, reporter: Reporter
) -> tuple[list[Path], StreamedSources | None]:
    commits = _earlier_commits(store)
    models: list[tuple[Repository, Needed] | Path] = []
    for one in inputs:
        if isinstance(one, Path):
            models.append(one)
            continue
        asked = HubName(one.repo, commits.get(str(one), one.revision), one.variant)
        found = Repository.open(asked)
        models.append((found, needed_files(found.files, one.variant, str(one), found.fetch)))
    names = [str(one) for one in inputs]
    if store.header is None and all(isinstance(found, Path) or _is_cached(*found) for found in models):
        paths = [model if isinstance(model, Path) else download(*model, reporter) for model in models]
        store.remove()
        return paths, None
    parts = [(name, *one) for name, one in zip(names, models, strict=True) if isinstance(one, tuple)]
    store.begin({"models": [_record(*part) for part in parts]})
    files: dict[Path, HubFile] = {}
    readers: dict[Path, RemoteFile] = {}
    paths = []
    for number, model in enumerate(models):
        if isinstance(model, Path):
            paths.append(model)
            continue
        repository, needed = model
        folder = f"{number}-{repository.name.model}"
        weights = _add_files(store, folder, repository, needed, files, readers)
        _bring_texts(store.folder / folder, repository, needed)
        paths.append(weights[0] if needed.kind == "gguf" else store.folder / folder)
        total = format_bytes(sum(files[path].num_bytes for path in weights))
        about = f"commit {repository.commit[:12]}, {total} in {len(weights)} files"
        reporter.say(f"{repository.name}: {about}, downloaded piece by piece")
    fetcher = Fetcher(store, readers)
    try:
        heads = bring_headers(store, fetcher)
    except BaseException:
        fetcher.close()
        raise
    return paths, StreamedSources(store, fetcher, files, heads)


def _earlier_commits(store: SourceStore) -> dict[str, str]:
    models = (store.header or {}).get("models")
    if not isinstance(models, list):
        return {}
    return {str(one.get("name")): str(one.get("commit")) for one in models if isinstance(one, dict)}


def _is_cached(repository: Repository, needed: Needed) -> bool:
    return all(repository.cached(name) is not None for name in needed.weights)


def _record(name: str, repository: Repository, needed: Needed) -> dict[str, Any]:
    files = [repository.file(weight) for weight in needed.weights]
    return {
        "name": name,
        "commit": repository.commit,
        "files": [[file.name, file.num_bytes, file.digest] for file in files],
    }


def _add_files(
    store: SourceStore,
    folder: str,
    repository: Repository,
    needed: Needed,
    files: dict[Path, HubFile],
    readers: dict[Path, RemoteFile],
) -> list[Path]:
    paths = []
    for name in needed.weights:
        file = repository.file(name)
        path = store.add(f"{folder}/{name.rpartition('/')[2]}", file.num_bytes).path
        files[path] = file
        readers[path] = RemoteFile(repository.url(name), file.num_bytes, f"{repository.name}: {name}")
        paths.append(path)
    return paths


def _bring_texts(folder: Path, repository: Repository, needed: Needed) -> None:
    folder.mkdir(exist_ok=True)
    for name in needed.texts:
        with AtomicFile(folder / name) as file:
            file.write(repository.fetch(name).read_bytes(), 0)
            file.commit()


def bring_headers(store: SourceStore, fetcher: Fetcher) -> dict[Path, int]:
    """Fetches every file's header. Returns where each ends, as far as it makes sense: what is wrong with one
    is told by whoever opens it.
    """
    fetcher.allowed_bytes = 1 << 62
    sizes = {path: file.num_bytes for path, file in store.files.items()}
    fetcher.expect([(path, Spans([(0, min(size, _FIRST_BYTES))])) for path, size in sizes.items()])
    heads = {}
    for path, size in sizes.items():
        fetcher.need(path, 0, min(size, _FIRST_BYTES))
        heads[path] = (
            _gguf_head(path, size, fetcher) if path.suffix == ".gguf" else _head(path, size, fetcher)
        )
    fetcher.allowed_bytes = 0
    return heads


def _head(path: Path, size: int, fetcher: Fetcher) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    end = min(size, LENGTH_BYTES + min(length, MAX_HEADER_BYTES))
    fetcher.need(path, 0, end)
    return end


def _gguf_head(path: Path, size: int, fetcher: Fetcher) -> int:
    known = min(size, _FIRST_BYTES)
    while True:
        with path.open("rb") as file:
            data = file.read(known)
        try:
            return gguf_header_bytes(memoryview(data), str(path))
        except FormatError:
            if known >= min(size, MAX_HEADER_BYTES):
                return known
        known = min(size, MAX_HEADER_BYTES, 4 * known)
        fetcher.need(path, 0, known)
