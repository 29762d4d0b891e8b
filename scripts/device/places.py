"""Where bundles are made: a folder in RAM and one on disk, and the bundles in them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError
from scripts.device.context import GIB, Context, Stack
from scripts.models.make_random_bundle import BundleRequest, bundle_bytes, make_bundle
from scripts.models.model_files import Shape
from scripts.models.model_shapes import BUNDLE_SHAPES, apply_overrides
from scripts.models.random_bundle.request import spec_of_shape

SHARE_OF_MEMORY = 0.6
MOST_RAM_BYTES = 64 * GIB
DISK_RESERVE_BYTES = 4 * GIB


def ram_bytes(context: Context) -> int:
    """What bundles in RAM may take together: what was named, or 60 % of what is available, at most 64 GiB."""
    if context.ram_bytes is not None:
        return context.ram_bytes
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return min(int(available * SHARE_OF_MEMORY), MOST_RAM_BYTES)


def ram_folder(context: Context) -> Path:
    """A folder on tmpfs: one of huge pages of its own if we may mount it, else in /dev/shm."""
    own = context.folder / "ram"
    if (
        context.is_cuda
        and os.geteuid() == 0
        and (os.path.ismount(own) or mount(own, ram_bytes(context) + 2 * GIB))
    ):
        return own
    # By the whole path: two runs may use folders of the same name.
    name = hashlib.blake2b(str(context.folder.resolve()).encode(), digest_size=6).hexdigest()
    shared = Path("/dev/shm") / f"krasis-{name}"  # noqa: S108 -- tmpfs is the point
    shared.mkdir(parents=True, exist_ok=True)
    return shared


def mount(folder: Path, num_bytes: int) -> bool:
    """Whether a tmpfs with huge pages could be mounted there."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={num_bytes},huge=always,mode=0755"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("$", " ".join(command), "->", done.stderr.strip() or "ok", flush=True)
    return done.returncode == 0


def disk_folder(context: Context) -> Path:
    """A folder beside the results; whether that is a disk is reported."""
    folder = context.folder / "disk"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def filesystem_of(folder: Path) -> str:
    """Its type, as the kernel names it."""
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def shape_of(stack: Stack, num_layers: int) -> Shape:
    return apply_overrides(
        BUNDLE_SHAPES[stack.name], {**stack.changes, "num_hidden_layers": num_layers}, None
    )


def request_of(context: Context, stack: Stack, num_layers: int, tiers: tuple[str, ...]) -> BundleRequest:
    shape, pool_bytes = shape_of(stack, num_layers), context.sizes.pool_bytes
    return BundleRequest(shape, tiers=tiers, cpu_format=stack.cpu_format, pool_bytes=pool_bytes)


def layers_within(context: Context, stack: Stack, tiers: tuple[str, ...], num_bytes: int) -> int:
    """The most layers of a stack whose bundle takes no more; at least one."""
    one = bundle_bytes(request_of(context, stack, 1, tiers))
    each = bundle_bytes(request_of(context, stack, 2, tiers)) - one
    count = max(1, min(stack.max_layers, 1 + (num_bytes - one) // each))
    # Paddings are not the same for every layer.
    while count > 1 and bundle_bytes(request_of(context, stack, count, tiers)) > num_bytes:
        count -= 1
    return count


def bundle_in_ram(context: Context, label: str) -> tuple[Path, dict[str, Any]]:
    """A stack's bundle with both tiers, made if it is not there; others are removed first."""
    stack, tiers = context.sizes.stack(label), ("gpu", "cpu")
    num_layers = layers_within(context, stack, tiers, ram_bytes(context))
    return ensure(context, ram_folder(context), stack, num_layers, tiers)


def bundle_on_disk(context: Context, label: str) -> tuple[Path, dict[str, Any]]:
    """A stack's bundle with GPU experts only, as large as the sizes say and the disk holds."""
    stack, tiers, folder = context.sizes.stack(label), ("gpu",), disk_folder(context)
    room = shutil.disk_usage(folder).free - (DISK_RESERVE_BYTES if context.size == "real" else 0)
    num_layers = layers_within(context, stack, tiers, min(context.sizes.disk_bytes, room))
    return ensure(context, folder, stack, num_layers, tiers)


def ensure(
    context: Context, folder: Path, stack: Stack, num_layers: int, tiers: tuple[str, ...]
) -> tuple[Path, dict[str, Any]]:
    """(path, facts) of a bundle; facts has seconds and GB/s of making it, 0 if it was there."""
    path = folder / f"{stack.label}-{num_layers}-{'-'.join(tiers)}.krasis"
    seconds = 0.0
    if not opens(path):
        for other in folder.glob("*.krasis*"):
            shutil.rmtree(other)
        begin = time.perf_counter()
        make_bundle(request_of(context, stack, num_layers, tiers), path)
        seconds = time.perf_counter() - begin
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: {num_bytes / 1e9:.1f} GB, {num_layers} layers, made in {seconds:.1f} s", flush=True)
    return path, {
        "num_layers": num_layers,
        "model_layers": len(spec_of_shape(BUNDLE_SHAPES[stack.name]).layers),
        "bundle_bytes": num_bytes,
        "filesystem": filesystem_of(folder),
        "made_s": seconds,
    }


def opens(path: Path) -> bool:
    try:
        Bundle.open(path).close()
    except FormatError:
        return False
    return True
