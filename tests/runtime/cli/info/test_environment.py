"""The environment probe against made-up machines (a tree of /proc and /sys files) and this one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.formats import native
from krasis.formats.errors import NativeError
from krasis.runtime.host import environment
from krasis.runtime.host.environment import (
    CUDA_LIBRARY_NAME,
    choose_isa,
    probe_cpu,
    probe_environment,
    probe_libraries,
    probe_memory,
    probe_torch,
)
from krasis.runtime.host.environment_report import environment_to_json, environment_to_text

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB with a THP mode and no cgroup limit."""
    put(tmp_path, "proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nFilePmdMapped: 0 kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/user.slice/job\n")
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    put(tmp_path, "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always [never]\n")
    put(tmp_path, "sys/devices/system/cpu/online", "0-63,128\n")
    put(tmp_path, "sys/devices/system/node/online", "0-1\n")
    put(tmp_path, "proc/cpuinfo", "model name\t: Imaginary 9000\nflags\t\t: fpu avx2 fma f16c avx512f\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def without_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As in a source tree where nothing was built."""

    def missing() -> None:
        raise NativeError("the native library is not installed", where="libkrasis_cpu.so")

    monkeypatch.setattr(native, "library", missing)
    monkeypatch.setattr(native, "library_path", missing)
    monkeypatch.setenv("KRASIS_LIB_DIR", str(folder))


def test_memory_without_a_limit(root: Path):
    memory = probe_memory(root)
    assert (memory.total_bytes, memory.available_bytes, memory.limit_bytes) == (64 * GIB, 32 * GIB, 64 * GIB)
    assert memory.limit_reason == "all of the RAM"
    assert (memory.transparent_huge_pages, memory.shmem_huge_pages) == ("madvise", "never")
    assert memory.file_huge_pages.startswith("possible")


def test_the_tightest_cgroup_limit_above_this_process_counts(root: Path):
    put(root, "sys/fs/cgroup/user.slice/memory.max", f"{16 * GIB}\n")
    put(root, "sys/fs/cgroup/user.slice/job/memory.max", "max\n")
    memory = probe_memory(root)
    assert (memory.limit_bytes, memory.limit_reason) == (16 * GIB, "the cgroup's limit")
    assert memory.available_bytes == 16 * GIB
    put(root, "sys/fs/cgroup/user.slice/job/memory.max", f"{8 * GIB}\n")
    assert probe_memory(root).limit_bytes == 8 * GIB


def test_a_version_1_cgroup_counts_and_its_no_limit_does_not(root: Path):
    put(root, "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    put(root, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n")
    assert probe_memory(root).limit_reason == "all of the RAM"
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    assert probe_memory(root).limit_bytes == 2 * GIB


def test_what_a_cgroup_uses_is_not_available_but_its_page_cache_is(root: Path):
    put(root, "sys/fs/cgroup/user.slice/job/memory.max", f"{8 * GIB}\n")
    put(root, "sys/fs/cgroup/user.slice/job/memory.current", f"{7 * GIB}\n")
    put(
        root,
        "sys/fs/cgroup/user.slice/job/memory.stat",
        f"anon 1\nactive_file {GIB}\ninactive_file {3 * GIB}\n",
    )
    put(root, "sys/fs/cgroup/user.slice/memory.max", f"{16 * GIB}\n")
    assert probe_memory(root).available_bytes == 5 * GIB
    # a parent that others have filled leaves less
    put(root, "sys/fs/cgroup/user.slice/memory.current", f"{14 * GIB}\n")
    memory = probe_memory(root)
    assert (memory.available_bytes, memory.limit_bytes) == (2 * GIB, 8 * GIB)


def test_a_version_1_cgroup_uses_memory_too(root: Path):
    put(root, "proc/self/cgroup", "4:memory:/docker/abc\n")
    put(root, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", f"{4 * GIB}\n")
    put(root, "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", f"{3 * GIB}\n")
    put(root, "sys/fs/cgroup/memory/docker/abc/memory.stat", f"total_inactive_file {GIB}\ninactive_file 5\n")
    assert probe_memory(root).available_bytes == 2 * GIB


def test_a_cgroup_path_does_not_escape(root: Path):
    put(root, "proc/self/cgroup", "0::/../../outside\n")
    put(root, "outside/memory.max", "1\n")
    assert probe_memory(root).limit_reason == "all of the RAM"


def test_a_limit_above_the_ram_is_none(root: Path):
    put(root, "sys/fs/cgroup/user.slice/memory.max", f"{128 * GIB}\n")
    assert probe_memory(root).limit_bytes == 64 * GIB


def test_an_old_kernel_has_no_file_huge_pages(root: Path):
    put(root, "proc/meminfo", "MemTotal: 1024 kB\n")
    assert probe_memory(root).file_huge_pages == "not supported by this kernel"


VNNI = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni")


@pytest.mark.parametrize(
    ("features", "isa", "reason"),
    [
        (("avx2", "fma", "f16c"), "avx2", "lacks avx512f, avx512bw, avx512vl, avx512_vnni"),
        (("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"), "avx2", "lacks avx512_vnni"),
        (VNNI, "avx512_vnni", "no AMX"),
        ((*VNNI, "amx_int8"), "amx_int8", "AMX"),
        (("avx2", "fma", "f16c", "amx_int8"), "avx2", "lacks avx512f"),
        (("avx2", "fma"), "", "lacks f16c"),
        ((), "", "lacks avx2, fma, f16c"),
    ],
)
def test_the_instruction_set_and_why(features: tuple[str, ...], isa: str, reason: str):
    chosen, why = choose_isa(features)
    assert chosen == isa
    assert reason in why


def test_amx_that_the_system_declines_is_not_chosen():
    chosen, why = choose_isa((*VNNI, "amx_int8"), errno.EPERM)
    assert chosen == "avx512_vnni"
    assert "declines AMX (Operation not permitted)" in why


def test_the_choice_is_the_native_pools_choice():
    with native.Pool(num_threads=1) as pool:
        assert probe_cpu().isa == pool.isa


def test_a_machine_without_the_library_is_still_described(root: Path, monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path)
    found = probe_environment(with_torch=False, root=root)
    assert found.cpu.brand == "Imaginary 9000"
    assert found.cpu.features == ("avx2", "fma", "f16c", "avx512f")
    assert (found.cpu.num_online_cpus, found.cpu.num_numa_nodes) == (65, 2)
    assert any("native CPU library" in finding for finding in found.findings)
    text = environment_to_text(found)
    assert "Imaginary 9000" in text
    assert "the native library is not installed" in text


def test_affinity_is_what_counts():
    allowed = os.sched_getaffinity(0)
    assert probe_cpu().num_cpus == len(allowed)


def test_a_cuda_library_is_found_beside_the_other(monkeypatch, tmp_path: Path):
    cpu = tmp_path / native.LIBRARY_NAME
    cpu.symlink_to(native.library_path())
    monkeypatch.setenv("KRASIS_LIB_DIR", str(tmp_path))
    assert "built without CUDA" in probe_libraries().cuda_problem
    (tmp_path / CUDA_LIBRARY_NAME).touch()
    libraries = probe_libraries()
    assert (libraries.cuda_path, libraries.cuda_problem) == (str(tmp_path / CUDA_LIBRARY_NAME), "")


def test_a_cuda_library_named_by_the_environment(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("KRASIS_CUDA_LIB", str(tmp_path / "mine.so"))
    assert f"no {tmp_path / 'mine.so'}" in probe_libraries().cuda_problem
    (tmp_path / "mine.so").touch()
    libraries = probe_libraries()
    assert (libraries.cuda_path, libraries.cuda_problem) == (str(tmp_path / "mine.so"), "")


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, root: Path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _: object())
    found = probe_torch(root)
    assert found.version == ""
    assert "cannot be imported" in found.problem


def test_a_missing_torch_is_reported(monkeypatch, root: Path):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _: None)
    assert probe_torch(root).problem == "torch is not installed"


def test_findings_say_what_is_off(root: Path, monkeypatch, tmp_path):
    put(root, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    put(root, "sys/fs/cgroup/user.slice/memory.max", f"{GIB}\n")
    findings = " ".join(probe_environment(with_torch=False, root=root).findings)
    assert "transparent huge pages are off" in findings
    assert "limited by a cgroup" in findings
    assert "affinity allows" in findings


def test_json_has_plain_types(root: Path):
    record = environment_to_json(probe_environment(with_torch=False, root=root))
    assert set(record) == {"cpu", "memory", "libraries", "torch", "findings"}
    assert record["torch"] is None
    assert record["memory"]["total_bytes"] == 64 * GIB


def test_importing_the_probe_does_not_import_torch_or_numpy_wrappers():
    code = (
        "import sys, krasis.runtime.cli.info_command; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
