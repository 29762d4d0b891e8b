"""What this process may use: CPU, memory, huge pages, native libraries, torch and CUDA; and why something is
off.

Nothing here raises for a part that is missing: it is reported. Only ``probe_environment`` with ``with_torch``
imports torch.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from krasis.formats import native
from krasis.formats.errors import KrasisError
from krasis.formats.process.machine_limits import MemoryLimits, meminfo, memory_limits, usable_cpus
from krasis.runtime.device.library import cuda_candidates
from krasis.runtime.host.visible_gpus import driver_loaded, gpus_hidden

CUDA_LIBRARY_NAME = "libkrasis_cuda.so"
_CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
)
_USED_HERE = ("krasis_cpu_probe", "krasis_read_bandwidth")
_NEEDED = ("avx2", "fma", "f16c")
_VNNI_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")
_MAX_CPUS = 1 << 16


class _CpuInfo(ctypes.Structure):
    """``krasis_cpu_info`` of csrc/krasis.h."""

    _fields_ = (
        *((f"has_{feature}", ctypes.c_int32) for feature in _CPU_FEATURES),
        ("num_logical_cpus", ctypes.c_int32),
        ("num_numa_nodes", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int64),
        ("l3_bytes", ctypes.c_int64),
        ("brand", ctypes.c_char * 64),
    )


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. ``isa`` is the kernels' choice (empty: none can run), ``isa_reason`` says why."""

    brand: str
    features: tuple[str, ...]
    isa: str
    isa_reason: str
    num_cpus: int
    num_online_cpus: int
    num_numa_nodes: int
    l2_bytes: int
    l3_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM in bytes. ``limit_bytes``: the smaller of the RAM and the cgroup's limit; ``available_bytes``: what
    can be had of it without swapping, page cache included. Huge page settings as the kernel prints them.
    """

    total_bytes: int
    available_bytes: int
    limit_bytes: int
    limit_reason: str
    transparent_huge_pages: str
    file_huge_pages: str
    shmem_huge_pages: str
    locked_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class NativeLibraries:
    """The two native libraries. A problem is an empty string when all is well."""

    cpu_path: str
    cpu_abi: int | None
    cpu_problem: str
    cuda_path: str
    cuda_problem: str


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A CUDA device as torch sees it."""

    index: int
    name: str
    vram_bytes: int
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Torch:
    """torch and its CUDA. ``version`` is empty if torch cannot be imported; ``problem`` says why CUDA is
    off.
    """

    version: str
    cuda_version: str
    devices: tuple[GpuInfo, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class Environment:
    """All of it. ``findings``: one sentence for everything that is off, with the reason."""

    cpu: Cpu
    memory: Memory
    libraries: NativeLibraries
    torch: Torch | None
    findings: tuple[str, ...]


def probe_environment(*, with_torch: bool, root: Path = Path("/")) -> Environment:
    """Looks at this machine. ``root`` stands for the file system's root, so that tests can show another
    machine's files.
    """
    libraries = probe_libraries()
    cpu = probe_cpu(root)
    memory = probe_memory(root)
    torch = probe_torch(root) if with_torch else None
    return Environment(cpu, memory, libraries, torch, tuple(_findings(cpu, memory, libraries, torch)))


def probe_libraries() -> NativeLibraries:
    """Finds both libraries and loads the CPU one."""
    cpu_path, abi, problem = "", None, ""
    try:
        path = native.library_path()
        cpu_path = str(path)
        library = native.library()
        abi = int(library.krasis_abi_version())
        missing = [name for name in _USED_HERE if not hasattr(library, name)]
        if missing:
            problem = f"{cpu_path} lacks {', '.join(missing)}: rebuild or reinstall the package"
    except KrasisError as error:
        problem = str(error)
    folder = Path(cpu_path).parent if cpu_path else None
    named = "KRASIS_CUDA_LIB" in os.environ
    candidates = cuda_candidates() if folder or named else []
    cuda = next((path for path in candidates if path.is_file()), None)
    if cuda is not None:
        return NativeLibraries(cpu_path, abi, problem, str(cuda), "")
    where = f" (no {candidates[0] if named else f'{CUDA_LIBRARY_NAME} in {folder}'})" if candidates else ""
    return NativeLibraries(cpu_path, abi, problem, "", f"built without CUDA{where}")


def probe_cpu(root: Path = Path("/")) -> Cpu:
    """The processor by the native probe; without the library by /proc/cpuinfo."""
    usable = usable_cpus(root)
    online = _cpu_list_length(_read(root / "sys/devices/system/cpu/online")) or os.cpu_count() or usable
    info = _native_cpu_info()
    if info is not None:
        features = tuple(name for name in _CPU_FEATURES if getattr(info, f"has_{name}"))
        brand = info.brand.decode("ascii", "replace").strip()
        nodes, l2, l3 = int(info.num_numa_nodes), int(info.l2_bytes), int(info.l3_bytes)
    else:
        features, brand = _proc_cpuinfo(root)
        nodes = _cpu_list_length(_read(root / "sys/devices/system/node/online")) or 1
        l2, l3 = 0, 0
    declined = _amx_declined() if "amx_int8" in features else 0
    isa, reason = choose_isa(features, declined)
    return Cpu(brand, features, isa, reason, usable, online, nodes, l2, l3)


def choose_isa(features: tuple[str, ...], amx_declined: int = 0) -> tuple[str, str]:
    """(instruction set, why) for CPU features by their names in ``krasis_cpu_info``; ("", why) if none can
    run. amx_declined: the errno with which the operating system declines AMX's tiles, 0 if it grants them.
    """
    missing = [name for name in _NEEDED if name not in features]
    if missing:
        return "", f"this CPU lacks {', '.join(missing)}"
    missing = [name for name in _VNNI_NEEDED if name not in features]
    if missing:
        return "avx2", f"AVX-512 VNNI is not there (lacks {', '.join(missing)})"
    if "amx_int8" not in features:
        return "avx512_vnni", "the CPU has AVX-512 VNNI, and no AMX"
    if amx_declined:
        return "avx512_vnni", f"the operating system declines AMX ({os.strerror(amx_declined)})"
    return "amx_int8", "the CPU has AVX-512 VNNI and AMX, the fastest kernels built in"


def _amx_declined() -> int:
    try:
        function = native.library().krasis_amx_declined
    except (KrasisError, AttributeError):
        return errno.ENOSYS
    function.argtypes = []
    function.restype = ctypes.c_int32
    return int(function())


def _native_cpu_info() -> _CpuInfo | None:
    try:
        function = native.library().krasis_cpu_probe
    except (KrasisError, AttributeError):
        return None  # probe_libraries reports a library that cannot be loaded
    function.argtypes = [ctypes.POINTER(_CpuInfo)]
    function.restype = ctypes.c_int32
    info = _CpuInfo()
    native.check(function(ctypes.byref(info)), "krasis_cpu_probe")
    return info


def _proc_cpuinfo(root: Path) -> tuple[tuple[str, ...], str]:
    text = _read(root / "proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    brand = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    return tuple(name for name in _CPU_FEATURES if name in words), brand.group(
        1
    ).strip() if brand else "unknown"


def probe_memory(root: Path = Path("/")) -> Memory:
    """RAM, the cgroup's limit and the huge page modes."""
    info = meminfo(root)
    limits = memory_limits(root) or MemoryLimits(0, 0, "all of the RAM", 0, "")
    pages = root / "sys/kernel/mm/transparent_hugepage"
    return Memory(
        total_bytes=limits.total_bytes,
        available_bytes=limits.available_bytes,
        limit_bytes=limits.limit_bytes,
        limit_reason=limits.limit_reason,
        transparent_huge_pages=_chosen(_read(pages / "enabled")),
        file_huge_pages=_file_huge_pages(root, info),
        shmem_huge_pages=_chosen(_read(pages / "shmem_enabled")),
        locked_limit_bytes=_locked_limit(),
    )


def _file_huge_pages(root: Path, meminfo: dict[str, int]) -> str:
    if "FilePmdMapped" not in meminfo:
        return "not supported by this kernel"
    if _chosen(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")) == "never":
        return "off (transparent huge pages are 'never')"
    return "possible (ext4, xfs and btrfs back 2 MiB-aligned mappings on recent kernels)"


def _locked_limit() -> int | None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def probe_torch(root: Path = Path("/")) -> Torch:
    """Imports torch and asks it for CUDA devices; failure is reported, not raised."""
    if importlib.util.find_spec("torch") is None:
        return Torch("", "", (), "torch is not installed")
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return Torch("", "", (), f"torch cannot be imported: {_first_line(error)}")
    cuda_version = str(torch.version.cuda or "")
    if not cuda_version:
        return Torch(torch.__version__, "", (), "this torch is built without CUDA")
    try:
        if not torch.cuda.is_available():
            return Torch(torch.__version__, cuda_version, (), _why_no_device(root))
        devices = tuple(
            _device(torch.cuda.get_device_properties(index), index) for index in range(_num_devices())
        )
    except (RuntimeError, OSError) as error:
        return Torch(torch.__version__, cuda_version, (), f"CUDA failed: {_first_line(error)}")
    return Torch(torch.__version__, cuda_version, devices, "")


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _device(properties: object, index: int) -> GpuInfo:
    major, minor = getattr(properties, "major", 0), getattr(properties, "minor", 0)
    name, vram = getattr(properties, "name", ""), getattr(properties, "total_memory", 0)
    return GpuInfo(index, str(name), int(vram), f"{major}.{minor}")


def _why_no_device(root: Path) -> str:
    if not nvidia_driver_loaded(root):
        return "no NVIDIA driver is loaded"
    if hidden := gpus_hidden():
        return hidden
    return "the NVIDIA driver is loaded but torch finds no device (driver older than torch's CUDA?)"


def nvidia_driver_loaded(root: Path = Path("/")) -> bool:
    """Whether the kernel has the NVIDIA driver (cheap; no CUDA call)."""
    return driver_loaded(root)


def _findings(cpu: Cpu, memory: Memory, libraries: NativeLibraries, torch: Torch | None) -> list[str]:
    found = []
    if libraries.cpu_problem:
        found.append(f"native CPU library: {libraries.cpu_problem}")
    if not cpu.isa:
        found.append(f"no kernel can run: {cpu.isa_reason}")
    if libraries.cuda_problem:
        found.append(f"GPU path off: {libraries.cuda_problem}")
    if torch is not None and torch.problem:
        found.append(f"CUDA through torch off: {torch.problem}")
    if cpu.num_cpus < cpu.num_online_cpus:
        by = "affinity" if cpu.num_cpus == len(os.sched_getaffinity(0)) else "the control group's CPU quota"
        found.append(f"{by} allows {cpu.num_cpus} of {cpu.num_online_cpus} CPUs")
    if memory.limit_bytes < memory.total_bytes:
        found.append("memory is limited by a cgroup below the machine's RAM")
    if memory.transparent_huge_pages == "never":
        found.append("transparent huge pages are off: decode reads RAM slower (set 'madvise' or 'always')")
    return found


def _cpu_list_length(text: str) -> int:
    """The number of CPUs in a kernel list such as ``0-3,8``; 0 if there is none."""
    count = 0
    for match in re.finditer(r"(\d+)(?:-(\d+))?", text):
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        count += max(0, min(last, _MAX_CPUS) - first + 1)
    return count


def _chosen(text: str) -> str:
    """``madvise`` of ``always [madvise] never``."""
    match = re.search(r"\[(\S+)\]", text)
    return match.group(1) if match else "unknown"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(path: Path) -> str:
    """A small text file of the kernel; empty if it is not there."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
