"""krasis_map_file, krasis_unmap_file, krasis_prefault: alignment, content, huge pages, no leaks."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.native import check
from krasis.runtime.cpu.native import prototype

MIB = 1 << 20


@contextmanager
def mapped(path, num_bytes=None, alignment_bytes=2 * MIB, fd=None):
    """Yields the address of the mapping."""
    own = os.open(path, os.O_RDONLY) if fd is None else fd
    size = path.stat().st_size if num_bytes is None else num_bytes
    address = ctypes.c_void_p(1)
    try:
        status = prototype("krasis_map_file")(own, size, alignment_bytes, ctypes.byref(address))
        check(status, "krasis_map_file")
    finally:
        if fd is None:
            os.close(own)
    try:
        yield address.value
    finally:
        check(prototype("krasis_unmap_file")(address, size), "krasis_unmap_file")


def content(address, num_bytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def file_of(tmp_path, num_bytes, name="data"):
    path = tmp_path / name
    data = (
        np.arange(num_bytes, dtype=np.uint32).view(np.uint8)[:num_bytes]
        if num_bytes
        else np.empty(0, np.uint8)
    )
    path.write_bytes(data.tobytes())
    return path, data


def mappings():
    return sorted(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("alignment_bytes", [4096, 65536, 2 * MIB, 1024 * MIB])
@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 3 * MIB + 5])
def test_maps_the_whole_file_at_the_alignment(tmp_path, num_bytes, alignment_bytes):
    path, data = file_of(tmp_path, num_bytes)
    with mapped(path, alignment_bytes=alignment_bytes) as address:
        assert address % alignment_bytes == 0
        np.testing.assert_array_equal(content(address, num_bytes), data)
        check(prototype("krasis_prefault")(address, num_bytes), "krasis_prefault")


def test_leaves_nothing_behind(tmp_path):
    path, _ = file_of(tmp_path, 5 * MIB)
    with mapped(path):
        pass
    with mapped(path) as address:
        lines = [line for line in mappings() if str(path) in line]
        assert len(lines) == 1
        first, last = (int(word, 16) for word in lines[0].split()[0].split("-"))
        assert (first, last) == (address, address + 5 * MIB)
    assert not [line for line in mappings() if str(path) in line]


def test_reserved_address_space_is_given_back(tmp_path):
    path, _ = file_of(tmp_path, 4096)

    def address_space_bytes():
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    before = address_space_bytes()
    for _ in range(4):  # wherever the reservation falls between two multiples of the alignment
        with mapped(path, alignment_bytes=1024 * MIB), mapped(path):
            assert address_space_bytes() - before < 64 * MIB
    pipe_read, pipe_write = os.pipe()
    os.close(pipe_write)
    for _ in range(3):
        with pytest.raises(NativeError), mapped(path, 4096, 1024 * MIB, fd=pipe_read):
            pass
    with pytest.raises(ResourceError), mapped(path, 4096, 1024 * MIB, fd=os.open(path, os.O_WRONLY)):
        pass  # a file that may not be read: the mapping itself fails, after the reservation
    os.close(pipe_read)
    assert address_space_bytes() - before < 64 * MIB


@pytest.mark.parametrize("num_bytes", [4095, 4097, 1 << 40])
def test_refuses_another_size_than_the_file_has(tmp_path, num_bytes):
    path, _ = file_of(tmp_path, 4096)
    with pytest.raises(NativeError, match="range"), mapped(path, num_bytes):
        pass


@pytest.mark.parametrize(
    ("num_bytes", "alignment_bytes"),
    [(0, 4096), (-1, 4096), (4096, 0), (4096, 2048), (4096, 12288), (4096, -4096), (2**63 - 1, 4096)],
)
def test_refuses_arguments(tmp_path, num_bytes, alignment_bytes):
    path, _ = file_of(tmp_path, 4096)
    with pytest.raises(NativeError, match="krasis_map_file"), mapped(path, num_bytes, alignment_bytes):
        pass


def test_system_errors_name_the_reason(tmp_path):
    path, _ = file_of(tmp_path, 4096)
    closed = os.open(path, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(ResourceError, match="Bad file descriptor"), mapped(path, 4096, fd=closed):
        pass


def test_prefault_brings_pages_in(tmp_path):
    path, _ = file_of(tmp_path, 8 * MIB)
    with mapped(path) as address:
        check(prototype("krasis_prefault")(address + 5, 8 * MIB - 5), "krasis_prefault")
        assert smaps_kib(address, "Rss") == 8 * 1024


def test_asks_for_huge_pages(tmp_path):
    path, _ = file_of(tmp_path, 2 * MIB)
    with mapped(path) as address:
        text = Path("/proc/self/smaps").read_text()
        flags = re.compile(r"^VmFlags: (.*)$", re.MULTILINE).search(text, text.index(f"\n{address:x}-"))
        if flags is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
            pytest.skip("the kernel has no transparent huge pages, or does not report flags")
        assert "hg" in flags[1].split()


def test_prefault_of_nothing_and_of_unmapped_addresses(tmp_path):
    path, _ = file_of(tmp_path, 4096)
    with mapped(path) as address:
        check(prototype("krasis_prefault")(address, 0), "krasis_prefault")
    with pytest.raises(ResourceError, match="krasis_prefault"):
        check(prototype("krasis_prefault")(address, 4096), "krasis_prefault")


def smaps_kib(address, field):
    """A field of the mapping that begins at address, KiB; None if the kernel does not report it."""
    text = Path("/proc/self/smaps").read_text()
    start = re.search(rf"^{address:x}-", text, re.MULTILINE)
    assert start is not None
    found = re.compile(rf"^{field}:\s+(\d+) kB$", re.MULTILINE).search(text, start.end())
    return int(found[1]) if found else None


def huge_pages_for_files(path):
    """Why files of this place are not mapped with huge pages; empty if they should be."""
    if platform.system() != "Linux":
        return "not Linux"
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    within = [mount for mount in mounts if path.is_relative_to(mount[1])]
    kind = max(within, key=lambda mount: len(mount[1]))[2]
    if kind not in ("ext4", "xfs") or release < (6, 16):
        return f"{kind} on Linux {platform.release()} is not known to keep huge folios"
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        return "transparent huge pages are off"
    return ""


def test_huge_pages(tmp_path):
    reason = huge_pages_for_files(tmp_path.resolve())
    if reason:
        pytest.skip(reason)
    most = 0
    for attempt in range(5):  # a fragmented memory may refuse some folios at first
        path = tmp_path / f"huge{attempt}"
        with path.open("wb", buffering=0) as file:
            for part in range(4):
                file.write(np.full(4 * MIB, part, np.uint8).data)
        with mapped(path) as address:
            check(prototype("krasis_prefault")(address, 16 * MIB), "krasis_prefault")
            huge = smaps_kib(address, "FilePmdMapped")
            if huge is None:
                pytest.skip("the kernel does not report FilePmdMapped")
            most = max(most, huge)
        if most == 16 * 1024:
            break
    assert most >= 8 * 1024
