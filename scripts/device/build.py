"""Builds and installs without a package index: the library for this GPU, the native tests, the Python
package.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.device.context import REPOSITORY, Context

# Module -> the distribution that has it. What the stages import, and what the build needs.
NEEDED = {
    "click": "click",
    "h5py": "h5py",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "xxhash": "xxhash",
    "zstandard": "zstandard",
    "gguf": "gguf",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "psutil": "psutil",
    "scikit_build_core": "scikit-build-core",
    "cmake": "cmake",
    "ninja": "ninja",
}


class BuildError(Exception):
    """The machine lacks something; the text says what and how to bring it."""


def run(context: Context) -> dict[str, Any]:
    """Everything that later stages run. Raises BuildError where something is missing or does not build."""
    carried = install_wheels(context)
    missing = missing_modules(NEEDED)
    if missing:
        raise BuildError(
            f"not installed, and no wheel in {context.wheels}: {', '.join(missing)}. "
            "Put wheels there on a machine with a package index: pip download --no-deps --only-binary=:all: "
            f"--python-version {sys.version_info.major}.{sys.version_info.minor} -d {context.wheels} NAME"
        )
    if shutil.which("nvcc") is None:
        raise BuildError("nvcc is not on the PATH: install the CUDA toolkit, or add its bin folder to PATH")
    arch = os.environ.get("ARCH") or compute_capability()
    native = start(["sh", str(REPOSITORY / "csrc/cuda/tests/device.sh")], native_environment(context, arch))
    try:
        finish(start(install_command(context, arch), dict(os.environ)), "pip install")
    finally:
        finish(native, "the native tests")
    return {"architecture": arch, "nvcc": version_of("nvcc"), "wheels": carried}


def install_wheels(context: Context) -> list[str]:
    """Unpacks the carried wheels into a folder of their own; gives their names."""
    wheels = sorted(context.wheels.glob("*.whl")) if context.wheels.is_dir() else []
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--upgrade", "--target", str(context.wheel_site), *(str(wheel) for wheel in wheels)]
        finish(start(command, dict(os.environ)), "pip install of the carried wheels")
    if context.wheel_site.is_dir() and str(context.wheel_site) not in sys.path:
        sys.path.insert(0, str(context.wheel_site))
    return [wheel.name for wheel in wheels]


def missing_modules(needed: Mapping[str, str]) -> list[str]:
    """Distributions of which the module is not found."""
    importlib.invalidate_caches()
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def compute_capability() -> str:
    """Such as 89 or 90a, of the first GPU. Raises BuildError if nvidia-smi cannot tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise BuildError(
            "nvidia-smi is not there: this machine has no NVIDIA driver (or name the GPU: ARCH=89)"
        )
    done = subprocess.run(
        [tool, "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.split()
    if done.returncode or not lines:
        raise BuildError(
            f"nvidia-smi does not say what the GPU is: {done.stderr.strip() or done.stdout.strip()}"
        )
    arch = lines[0].replace(".", "")
    # Hopper's own instructions (warpgroup products) exist under this name only.
    return {"90": "90a"}.get(arch, arch)


def install_command(context: Context, arch: str) -> list[str]:
    """pip, offline, with CUDA required."""
    return [
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--no-build-isolation",
            "--no-deps",
            "--upgrade",
        ),
        *("-C", f"build-dir={context.folder / 'build'}", "-C", "cmake.define.KRASIS_CUDA=on"),
        *(
            "-C",
            f"cmake.define.CMAKE_CUDA_ARCHITECTURES={arch}",
            "--target",
            str(context.site),
            str(REPOSITORY),
        ),
    ]


def native_environment(context: Context, arch: str) -> dict[str, str]:
    """What device.sh reads."""
    return {**os.environ, "BUILD": str(context.folder / "native"), "ARCH": arch, "BUILD_ONLY": "1"}


def start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Output goes to the stage's log."""
    print("$", " ".join(command), flush=True)
    return subprocess.Popen(command, env=dict(env))


def finish(process: subprocess.Popen[bytes], what: str) -> None:
    """Waits. Raises BuildError unless it succeeded."""
    code = process.wait()
    if code:
        raise BuildError(f"{what} failed with exit code {code}; its output is above")


def version_of(tool: str) -> str:
    """The last line of its --version."""
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]
