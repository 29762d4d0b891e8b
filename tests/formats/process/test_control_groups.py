"""Limits of control groups and of the process, on file systems made up for it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.formats.process import machine_limits
from krasis.formats.process.control_groups import cpu_quota, limited_groups
from krasis.formats.process.machine_limits import available_memory_bytes, memory_limits, usable_cpus
from krasis.formats.process.mount_table import filesystem_kind, mounts

GIB = 1 << 30


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def mount(root: str, point: str, kind: str, options: str = "rw") -> str:
    return f"30 23 0:26 {root} {point} rw,nosuid shared:4 master:1 - {kind} {kind} {options}\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine of 64 GiB of which 48 are free."""
    put(tmp_path, "proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB")
    return tmp_path


def version_2(machine: Path, path: str, *, root: str = "/", point: str = "/sys/fs/cgroup") -> None:
    put(machine, "proc/self/cgroup", f"0::{path}")
    put(machine, "proc/self/mountinfo", mount(root, point, "cgroup2"))


def test_without_limits_the_machine_counts(machine: Path) -> None:
    version_2(machine, "/user.slice")
    limits = memory_limits(machine)
    assert limits is not None
    assert (limits.limit_bytes, limits.available_bytes) == (64 * GIB, 48 * GIB)
    assert limits.available_reason == "the machine's free memory"


def test_the_tightest_of_nested_groups_counts_each_less_its_own_use(machine: Path) -> None:
    version_2(machine, "/a/b/c")
    base = "sys/fs/cgroup"
    put(machine, f"{base}/a/b/c/memory.max", 20 * GIB)
    put(machine, f"{base}/a/b/c/memory.current", 3 * GIB)
    put(machine, f"{base}/a/b/memory.max", "max")
    put(machine, f"{base}/a/memory.max", 24 * GIB)
    put(machine, f"{base}/a/memory.current", 20 * GIB)  # of neighbours
    put(
        machine,
        f"{base}/a/memory.stat",
        f"anon 5\nactive_file {2 * GIB}\ninactive_file {GIB}\nshmem {9 * GIB}",
    )
    limits = memory_limits(machine)
    assert limits is not None
    assert (limits.limit_bytes, limits.available_bytes) == (20 * GIB, 7 * GIB)
    assert limits.available_reason == "the control group's limit"


def test_the_high_mark_is_a_limit_too(machine: Path) -> None:
    version_2(machine, "/job")
    put(machine, "sys/fs/cgroup/job/memory.max", 20 * GIB)
    put(machine, "sys/fs/cgroup/job/memory.high", 10 * GIB)
    assert available_memory_bytes(machine) == 10 * GIB


def test_the_hierarchy_may_be_mounted_anywhere(machine: Path) -> None:
    version_2(machine, "/job", point="/run/groups\\040here")
    put(machine, "run/groups here/job/memory.max", 5 * GIB)
    assert available_memory_bytes(machine) == 5 * GIB


def test_a_container_that_sees_only_its_own_group(machine: Path) -> None:
    """Its mount begins at the group; the kernel names the group from the host's root."""
    version_2(machine, "/docker/abc/inner", root="/docker/abc")
    put(machine, "sys/fs/cgroup/memory.max", 6 * GIB)
    put(machine, "sys/fs/cgroup/inner/memory.max", "max")
    put(machine, "sys/fs/cgroup/docker/abc/memory.max", 1)  # of somebody else's group of that name
    assert available_memory_bytes(machine) == 6 * GIB


def test_a_namespace_whose_root_is_the_own_group(machine: Path) -> None:
    version_2(machine, "/")
    put(machine, "sys/fs/cgroup/memory.max", 6 * GIB)
    assert available_memory_bytes(machine) == 6 * GIB


@pytest.mark.parametrize(("path", "root"), [("/", "/../.."), ("/../other", "/..")])
def test_a_namespace_without_names_is_searched_for_the_process(machine: Path, path: str, root: str) -> None:
    version_2(machine, path, root=root)
    put(machine, "sys/fs/cgroup/cgroup.procs", "")
    put(machine, "sys/fs/cgroup/slice/memory.max", 4 * GIB)
    put(machine, "sys/fs/cgroup/slice/job/cgroup.procs", f"1\n{os.getpid()}")
    put(machine, "sys/fs/cgroup/neighbour/memory.max", GIB)
    put(machine, "sys/fs/cgroup/neighbour/cgroup.procs", "1\n2")
    assert available_memory_bytes(machine) == 4 * GIB


def version_1(machine: Path, path: str, root: str = "/") -> None:
    put(machine, "proc/self/cgroup", f"5:cpu,cpuacct:{path}\n4:memory:{path}\n0::/")
    put(
        machine,
        "proc/self/mountinfo",
        mount(root, "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
        + mount(root, "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
        + mount("/", "/sys/fs/cgroup/unified", "cgroup2"),
    )


def test_version_1_nested(machine: Path) -> None:
    version_1(machine, "/slurm/job/step")
    base = "sys/fs/cgroup/memory/slurm"
    put(machine, f"{base}/job/step/memory.limit_in_bytes", 9223372036854771712)
    put(machine, f"{base}/job/memory.limit_in_bytes", 8 * GIB)
    put(machine, f"{base}/job/memory.usage_in_bytes", 7 * GIB)
    put(machine, f"{base}/job/memory.stat", f"total_inactive_file {2 * GIB}\ninactive_file 7")
    assert available_memory_bytes(machine) == 3 * GIB
    put(machine, f"{base}/job/memory.use_hierarchy", 0)  # then it does not count what is below it
    assert available_memory_bytes(machine) == 48 * GIB


def test_version_1_tells_the_limit_of_groups_that_are_not_mounted(machine: Path) -> None:
    version_1(machine, "/docker/abc", root="/docker/abc")
    put(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    put(machine, "sys/fs/cgroup/memory/memory.usage_in_bytes", GIB)
    put(machine, "sys/fs/cgroup/memory/memory.stat", f"hierarchical_memory_limit {4 * GIB}")
    assert available_memory_bytes(machine) == 3 * GIB


@pytest.mark.parametrize("line", ["", "x", "30 23 0:26 / /p rw", "30 23 0:26 / /p rw - cgroup2", "\udcff:x"])
def test_odd_mount_tables_are_no_error(machine: Path, line: str) -> None:
    (machine / "proc/self").mkdir(parents=True)
    (machine / "proc/self/mountinfo").write_bytes(line.encode(errors="surrogateescape") + b"\n")
    put(machine, "proc/self/cgroup", "0::/job\nnonsense\n7:memory")
    assert limited_groups(machine) == []
    assert available_memory_bytes(machine) == 48 * GIB


def test_a_group_in_use_beyond_its_limit_leaves_nothing(machine: Path) -> None:
    version_2(machine, "/job")
    put(machine, "sys/fs/cgroup/job/memory.max", GIB)
    put(machine, "sys/fs/cgroup/job/memory.current", 2 * GIB)
    assert available_memory_bytes(machine) == 0


@pytest.mark.parametrize(("kind", "name"), [(resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")])
def test_the_process_own_limits_count(
    machine: Path, monkeypatch: pytest.MonkeyPatch, kind: int, name: str
) -> None:
    infinity = resource.RLIM_INFINITY
    monkeypatch.setattr(
        machine_limits.resource, "getrlimit", lambda asked: (8 * GIB if asked == kind else infinity, infinity)
    )
    put(machine, "proc/self/status", f"VmSize: {3 << 20} kB\nVmData: {3 << 20} kB")
    limits = memory_limits(machine)
    assert limits is not None
    assert (limits.available_bytes, limits.available_reason) == (5 * GIB, f"ulimit {name}")


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) is None
    assert available_memory_bytes(tmp_path) is None


# ---- CPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("250000 100000", "max 100000", 2.5),
        ("max 100000", "50000 100000", 0.5),
        ("800000 100000", "150000 50000", 3.0),
        ("", "nonsense", None),
        ("100000 0", "max", None),
    ],
)
def test_the_quota_of_version_2(machine: Path, own: str, above: str, quota: float | None) -> None:
    version_2(machine, "/a/b")
    put(machine, "sys/fs/cgroup/a/b/cpu.max", own)
    put(machine, "sys/fs/cgroup/a/cpu.max", above)
    assert cpu_quota(machine) == quota


def test_the_quota_of_version_1(machine: Path) -> None:
    version_1(machine, "/job")
    put(machine, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", -1)
    put(machine, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    assert cpu_quota(machine) is None
    put(machine, "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", 300000)
    put(machine, "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", 100000)
    assert cpu_quota(machine) == 3.0


@pytest.mark.parametrize(("quota", "cpus"), [("max", 8), ("350000", 3), ("20000", 1), ("6400000", 8)])
def test_threads_by_affinity_and_quota(
    machine: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int
) -> None:
    version_2(machine, "/job")
    put(machine, "sys/fs/cgroup/job/cpu.max", f"{quota} 100000")
    monkeypatch.setattr(machine_limits.os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(machine) == cpus


def test_a_pool_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    from krasis.formats import native

    monkeypatch.setattr(native, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(machine_limits, "cpu_quota", lambda root: 1.5)
    with native.Pool() as pool:
        assert pool.num_threads == 1
    with native.Pool(2) as pool:
        assert pool.num_threads == 2  # who names a number gets it


# ---- mounts ------------------------------------------------------------------------------------------------


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    real = os.path.realpath(tmp_path)
    put(
        tmp_path,
        "proc/self/mountinfo",
        mount("/", "/", "ext4") + mount("/", real, "xfs") + mount("/", f"{real}/stick", "vfat"),
    )
    (tmp_path / "stick2").mkdir()
    (tmp_path / "stick").mkdir()
    assert [entry.kind for entry in mounts(tmp_path)] == ["ext4", "xfs", "vfat"]
    assert filesystem_kind(tmp_path / "stick", tmp_path) == "vfat"
    assert filesystem_kind(tmp_path / "stick2", tmp_path) == "xfs"
    assert filesystem_kind(Path("/"), tmp_path) == "ext4"


def test_this_machine_says_something() -> None:
    limits = memory_limits()
    assert limits is not None
    assert 0 < limits.available_bytes <= limits.total_bytes
    assert filesystem_kind(Path("/proc")) == "proc"


def test_a_mapping_beyond_ulimit_v_says_so(tmp_path: Path) -> None:
    """In a process of its own: a limit on addresses cannot be taken back from every thread."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * GIB)
    code = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from krasis.formats.errors import ResourceError\n"
        "from krasis.formats.files.file_mapping import FileMapping\n"
        "from krasis.formats.files.regular_file import MappedFile\n"
        "path = Path(sys.argv[1])\n"
        "fd, size = os.open(path, os.O_RDONLY), path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size // 2, size // 2))\n"
        "for make in (lambda: FileMapping(fd, size), lambda: MappedFile(fd, size, path)):\n"
        "    try:\n"
        "        make()\n"
        "    except ResourceError as error:\n"
        "        print(error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all(line.startswith("ulimit -v allows this process 32768 MiB of addresses") for line in lines)
