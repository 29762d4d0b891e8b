"""Which GPUs this process may see, as far as it can be known without CUDA, and words for GPU options that do
nothing. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
# What hides all: nothing, an impossible number, and the word that SLURM gives jobs without GPUs.
_NONE = frozenset({"", "none", "void", "nodevfiles"})
_DEVICE_FILE = re.compile(r"nvidia\d+")


def driver_loaded(root: Path = Path("/")) -> bool:
    """Whether the kernel has the NVIDIA driver (cheap; no CUDA call)."""
    return (root / "proc/driver/nvidia/version").exists()


def gpus_hidden(environment: Mapping[str, str] = os.environ) -> str:
    """``CUDA_VISIBLE_DEVICES='-1' hides every GPU`` if it does; else empty. CUDA stops at the first number
    that is no device, so what begins with a negative one hides all.
    """
    value = environment.get(VARIABLE)
    if value is None:
        return ""
    first = value.split(",")[0].strip().lower()
    return f"{VARIABLE}={value!r} hides every GPU" if first in _NONE or first.startswith("-") else ""


def has_gpu(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an NVIDIA GPU is there for this process: a driver, a device file, nothing that hides it."""
    if not driver_loaded(root) or gpus_hidden(environment):
        return False
    try:
        return any(_DEVICE_FILE.fullmatch(entry.name) for entry in os.scandir(root / "dev"))
    except OSError:
        return False


def why_no_gpu(device: str, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> str:
    """Why a model runs on the CPU, in a few words; device: what was asked for."""
    if device == "cpu":
        return "--device cpu was given"
    if not driver_loaded(root):
        return "no NVIDIA driver is loaded"
    return gpus_hidden(environment) or "-v says why"


def idle_options_note(
    options: Sequence[str], device: str, root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> str:
    """One sentence about GPU options given to a model that runs on the CPU; empty without any."""
    if not options:
        return ""
    named = " and ".join(options)
    verb = "does" if len(options) == 1 else "do"
    return f"{named} {verb} nothing: the model runs on the CPU ({why_no_gpu(device, root, environment)})"
