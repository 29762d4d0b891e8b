"""Which kinds of host memory this machine's driver can pin, and how fast: tried, not looked up.

Each kind is made small, touched, registered, copied from (on a GPU), unregistered and given back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from krasis.formats.text_tables import text_paragraphs, text_table
from krasis.runtime.device.api import Device
from krasis.runtime.host.filesystem import filesystem_of, filesystem_of_path
from krasis.runtime.host_memory.memory import anonymous, tensor_of
from krasis.runtime.host_memory.registrar import Registrar, registrar_of

Bytes = npt.NDArray[np.uint8]
DEFAULT_BYTES = 256 * MIB
_WRITE_BYTES = 16 * MIB
_COPIES = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of memory. place: the file system or page size. register_s, unregister_s: 0 if refused.

    copy_gbps: host to device out of it, the best of three; None without a GPU. reason: the words of a
    refusal.
    """

    method: str
    place: str
    read_only: bool
    num_bytes: int
    ok: bool
    reason: str
    register_s: float = 0.0
    register_gbps: float = 0.0
    unregister_s: float = 0.0
    copy_gbps: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Kind:
    method: str
    place: str
    read_only: bool
    make: Callable[[int], AbstractContextManager[Bytes]]


def survey(device: Device, folders: Sequence[Path] = (), num_bytes: int = DEFAULT_BYTES) -> list[Trial]:
    """Tries every kind of memory for a device. See ``survey_with``."""
    return survey_with(registrar_of(device), device.torch_device, folders, num_bytes)


def survey_with(
    registrar: Registrar,
    torch_device: torch.device,
    folders: Sequence[Path] = (),
    num_bytes: int = DEFAULT_BYTES,
) -> list[Trial]:
    """Tries every kind of memory with num_bytes (rounded to 2 MiB).

    folders: where files are tried, besides the system's temporary folder and /dev/shm. torch_device: what is
    copied to. Nothing is raised for a kind that cannot be had: it is reported.
    """
    size = max(HUGE_PAGE_BYTES, num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return [_try(kind, torch_device, registrar, size) for kind in _kinds(folders)]


def survey_to_text(trials: Sequence[Trial]) -> str:
    """A table of at most 110 columns, and the words of refusals under it."""
    reasons = list(dict.fromkeys(trial.reason for trial in trials if not trial.ok))
    rows = []
    for trial in trials:
        speed = f"{trial.register_gbps:.1f}" if trial.ok else ""
        copy = f"{trial.copy_gbps:.1f}" if trial.copy_gbps is not None else ""
        flag = "read-only" if trial.read_only else "plain"
        result = "ok" if trial.ok else f"refused [{reasons.index(trial.reason) + 1}]"
        rows.append([trial.method, _shorten(trial.place, 34), flag, speed, copy, result])
    header = ["memory", "on", "flag", "pin GB/s", "H2D GB/s", "result"]
    notes = text_paragraphs(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1))
    return text_table(header, rows, "lllrrl") + ("\n" + notes if notes else "")


def _shorten(text: str, width: int) -> str:
    """At most width characters."""
    return text if len(text) <= width else text[: width - 3] + "..."


def _kinds(folders: Sequence[Path]) -> list[_Kind]:
    kinds = [
        _Kind("anonymous", "4 KiB pages", False, lambda size: _anonymous(size, huge_pages=False)),
        _Kind("anonymous", "transparent huge pages", False, lambda size: _anonymous(size, huge_pages=True)),
        _Kind("anonymous", "hugetlb", False, _hugetlb),
        _Kind("memfd", "shared, writable", False, _memfd),
    ]
    for folder in _distinct([Path(tempfile.gettempdir()), Path("/dev/shm"), *folders]):  # noqa: S108
        try:
            place = f"{filesystem_of_path(folder)} {folder}"
        except ResourceError as error:
            place = f"{folder}: {error.got}"
        for method, writable, read_only in (
            ("mapped file", False, True),
            ("mapped file", False, False),
            ("writable mapped file", True, False),
        ):
            kinds.append(_Kind(method, place, read_only, _file_maker(folder, writable)))
    kinds.extend(
        _Kind("writable mapped file", f"hugetlbfs {folder}", False, _file_maker(folder, True))
        for folder in _hugetlbfs_mounts()
    )
    return kinds


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Each device once: two folders of one file system behave alike."""
    found: dict[int, Path] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            found.setdefault(folder.stat().st_dev, folder)
    return list(found.values())


def _hugetlbfs_mounts() -> list[Path]:
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [Path(item[1]) for item in fields if len(item) > 2 and item[2] == "hugetlbfs"]


def _try(kind: _Kind, device: torch.device, registrar: Registrar, num_bytes: int) -> Trial:
    try:
        with kind.make(num_bytes) as memory:
            return _measure(kind, memory, device, registrar)
    except (KrasisError, OSError, ValueError, RuntimeError) as error:  # torch's are RuntimeErrors
        return Trial(kind.method, kind.place, kind.read_only, num_bytes, False, str(error))


def _measure(kind: _Kind, memory: Bytes, device: torch.device, registrar: Registrar) -> Trial:
    tensor = tensor_of(memory)
    start = time.perf_counter()
    registrar.register(tensor, read_only=kind.read_only)
    register_s = max(time.perf_counter() - start, 1e-9)
    try:
        rate = _copy_rate(memory, device)
    finally:
        start = time.perf_counter()
        registrar.unregister(tensor)
        unregister_s = time.perf_counter() - start
    return Trial(
        kind.method,
        kind.place,
        kind.read_only,
        memory.size,
        True,
        "",
        register_s,
        memory.size / register_s / 1e9,
        unregister_s,
        rate,
    )


def _copy_rate(memory: Bytes, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    source = tensor_of(memory)
    target = torch.empty(memory.size, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(_COPIES):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, memory.size / max(time.perf_counter() - start, 1e-9) / 1e9)
    return best


@contextlib.contextmanager
def _anonymous(num_bytes: int, *, huge_pages: bool) -> Iterator[Bytes]:
    memory = anonymous(num_bytes, huge_pages=huge_pages)
    memory.fill(1)
    yield memory


@contextlib.contextmanager
def _hugetlb(num_bytes: int) -> Iterator[Bytes]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise ResourceError(
            "no huge pages are reserved", got=error.strerror, hint="vm.nr_hugepages reserves them"
        ) from error
    memory = np.frombuffer(mapping, dtype=np.uint8)
    memory.fill(1)
    yield memory


_MAP_HUGETLB = 0x40000


@contextlib.contextmanager
def _memfd(num_bytes: int) -> Iterator[Bytes]:
    fd = os.memfd_create("krasis-survey", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes)
        memory = np.frombuffer(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED), dtype=np.uint8)
    finally:
        os.close(fd)
    memory.fill(1)
    yield memory


def _file_maker(folder: Path, writable: bool) -> Callable[[int], AbstractContextManager[Bytes]]:
    def make(num_bytes: int) -> AbstractContextManager[Bytes]:
        return _file(folder, num_bytes, writable)

    return make


@contextlib.contextmanager
def _file(folder: Path, num_bytes: int, writable: bool) -> Iterator[Bytes]:
    fd, name = tempfile.mkstemp(prefix="krasis-survey-", dir=folder)
    try:
        os.unlink(name)  # noqa: PTH108 -- gone whatever happens; the descriptor keeps it
        if filesystem_of(fd) == "hugetlbfs":
            os.ftruncate(fd, num_bytes)  # such files cannot be written, only mapped
        else:
            _write(fd, num_bytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(fd)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    int(memory[::4096].sum())  # every page is mapped: what is timed is pinning, not faulting
    yield memory


def _write(fd: int, num_bytes: int) -> None:
    block = bytes(_WRITE_BYTES)
    for begin in range(0, num_bytes, _WRITE_BYTES):
        os.write(fd, block[: min(_WRITE_BYTES, num_bytes - begin)])
    os.fsync(fd)
