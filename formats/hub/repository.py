"""A model on the hub at one commit: its files with sizes and checksums, and their way into the cache.

The cache, the token, mirrors and being offline are the hub's library's: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.hub.name import HubName
from krasis.formats.hub.refusals import hub_errors
from krasis.formats.limits import MAX_FILES
from krasis.formats.names import shown

_MAX_LISTED = 4 * MAX_FILES


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. digest: its SHA-256, or for small files that the hub keeps in git their
    blob's id (40 digits).
    """

    name: str
    num_bytes: int
    digest: str

    @property
    def has_sha256(self) -> bool:
        """Whether the digest is one of the file's bytes."""
        return len(self.digest) == 64


@dataclass(frozen=True, slots=True)
class Repository:
    """A model's repository at one commit. files: by name, folders in it with slashes."""

    name: HubName
    commit: str
    files: Mapping[str, HubFile | None]

    @classmethod
    def open(cls, name: HubName) -> Repository:
        """Asks the hub. Raises as ``hub_errors``; FormatError for an answer that makes no sense."""
        with hub_errors(str(name)):
            info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        siblings = info.siblings or []
        if info.sha is None or len(siblings) > _MAX_LISTED:
            got = f"{len(siblings)} files"
            raise FormatError("the hub's answer cannot be used", where=str(name), got=got)
        files: dict[str, HubFile | None] = {}
        for one in siblings:
            _check_path(one.rfilename, str(name))
            digest = one.lfs.sha256 if one.lfs is not None else one.blob_id
            known = one.size is not None and bool(digest)
            files[one.rfilename] = HubFile(one.rfilename, one.size or 0, digest or "") if known else None
        return cls(name, info.sha, files)

    def file(self, name: str) -> HubFile:
        """A file's record; asks once more where the list left it out. Raises as ``hub_errors``."""
        if name not in self.files:
            raise FormatError("the model has no such file", where=str(self.name), got=shown(name))
        found = self.files[name]
        if found is not None:
            return found
        with hub_errors(str(self.name)):
            metadata = get_hf_file_metadata(self.url(name), token=None)
        if metadata.size is None or metadata.etag is None:
            raise FormatError("the hub does not say how large a file is", where=f"{self.name}: {name}")
        return HubFile(name, metadata.size, metadata.etag)

    def url(self, name: str) -> str:
        """Where a file can be read."""
        return hf_hub_url(self.name.repo, name, revision=self.commit)

    def cached(self, name: str) -> Path | None:
        """The file in the cache, if it is there as a whole."""
        path = try_to_load_from_cache(self.name.repo, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, name: str) -> Path:
        """The file in the cache, downloaded unless it is there. Raises as ``hub_errors``."""
        with hub_errors(str(self.name)):
            return Path(hf_hub_download(self.name.repo, name, revision=self.commit))

    def remember_revision(self) -> None:
        """Notes in the cache which commit the revision is, so that it can be found without the hub."""
        revision = self.name.revision or constants.DEFAULT_REVISION
        if revision == self.commit or ".." in revision.split("/"):
            return
        path = _cache_folder(self.name) / "refs" / revision
        with hub_errors(str(self.name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.commit, "ascii")

    def num_bytes(self, names: Iterable[str]) -> int:
        """What these files have together."""
        return sum(self.file(name).num_bytes for name in names)


def cached_snapshot(name: HubName) -> Path | None:
    """The model's folder in the cache, as an earlier download left it; None if there is none."""
    folder = _cache_folder(name)
    revision = name.revision or constants.DEFAULT_REVISION
    try:
        commit = (folder / "refs" / revision).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    if os.sep in commit or not (folder / "snapshots" / commit).is_dir():
        return None
    return folder / "snapshots" / commit


def _cache_folder(name: HubName) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"


def is_offline() -> bool:
    """Whether the user forbade to ask the hub (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def _check_path(name: str, where: str) -> None:
    """Names become paths in the cache. FormatError for one that would lead out of it."""
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise FormatError("the hub names an impossible file", where=where, got=shown(name))


def open_or_cached(name: HubName) -> Repository | Path:
    """The repository, or without a way to the hub the model's folder in the cache.

    Raises as ``hub_errors``.
    """
    if not is_offline():
        try:
            return Repository.open(name)
        except ResourceError:
            if (snapshot := cached_snapshot(name)) is None:
                raise
            return snapshot
    if (snapshot := cached_snapshot(name)) is not None:
        return snapshot
    return Repository.open(name)  # which says it
