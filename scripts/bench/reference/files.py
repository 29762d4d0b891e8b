"""Bundles and GGUFs of random weights in memory: as many layers as fit, made when needed, removed after."""

from __future__ import annotations

import os
import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.models.make_random_bundle import BundleRequest, bundle_bytes, make_bundle
from scripts.models.make_random_gguf import gguf_bytes, make_gguf
from scripts.models.model_files import MoeShape
from scripts.models.model_shapes import SHAPES

Say = Callable[[str], None]
MANIFEST = "manifest.json"
MOUNT_RESERVE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Kind:
    """A model's shape and the bits of its experts. expert_type: GGUF's; cpu_format: the bundle's."""

    shape: str
    expert_type: str = "q4_0"
    cpu_format: str = "i4"

    def with_layers(self, num_layers: int) -> MoeShape:
        """The shape with so many layers."""
        return replace(SHAPES[self.shape], num_hidden_layers=num_layers)

    @property
    def all_layers(self) -> int:
        """Of the released model."""
        return SHAPES[self.shape].num_hidden_layers

    def request(self, num_layers: int) -> BundleRequest:
        """The bundle."""
        return BundleRequest(self.with_layers(num_layers), cpu_format=self.cpu_format)

    def bundle_bytes(self, num_layers: int) -> int:
        """Of the bundle's shards, both tiers."""
        return bundle_bytes(self.request(num_layers))

    def gguf_bytes(self, num_layers: int) -> int:
        """Of the GGUF."""
        return gguf_bytes(self.with_layers(num_layers), self.expert_type)

    def expert_bytes(self, num_layers: int) -> int:
        """Of these, the experts: what llama.cpp copies to memory of its own when it does not map the file."""
        shape = self.with_layers(num_layers)
        weights = 3 * shape.hidden_size * shape.moe_intermediate_size * shape.num_experts * num_layers
        return weights // 32 * {"q4_0": 18, "q8_0": 34}[self.expert_type]


def layers_for_one(kind: Kind, memory_bytes: int) -> int:
    """The most layers whose bundle fits by itself: Krasis computes from it where it lies."""
    return _most(kind, memory_bytes, kind.bundle_bytes)


def layers_for_both(kind: Kind, memory_bytes: int) -> int:
    """The most layers whose bundle, GGUF and llama.cpp's own copy of the experts fit together."""

    def needed(num_layers: int) -> int:
        own = kind.expert_bytes(num_layers)
        return kind.bundle_bytes(num_layers) + kind.gguf_bytes(num_layers) + own

    return _most(kind, memory_bytes, needed)


def _most(kind: Kind, memory_bytes: int, needed: Callable[[int], int]) -> int:
    """At least one: what then does not fit says so when it is made."""
    fitting = bisect_right(range(2, kind.all_layers + 1), memory_bytes, key=needed)
    return 1 + fitting


def memory_folder(work: Path, num_bytes: int, say: Say) -> Path:
    """A tmpfs of huge pages of its own below work; work itself, with a word, where none can be mounted."""
    folder = work / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(folder):
        return folder
    size = f"size={num_bytes + MOUNT_RESERVE_BYTES},huge=always,mode=0755"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{folder} is no tmpfs of huge pages ({done.stderr.strip()}): files lie where {work} lies")
    return folder


def bundle(kind: Kind, num_layers: int, folder: Path) -> Path:
    """Where a bundle lies."""
    return folder / f"{kind.shape}-{num_layers}-{kind.cpu_format}.krasis"


def gguf(kind: Kind, num_layers: int, folder: Path) -> Path:
    """Where a GGUF lies."""
    return folder / f"{kind.shape}-{num_layers}-{kind.expert_type}.gguf"


def make_room(folder: Path, keep: tuple[Path, ...]) -> None:
    """Removes what earlier steps left there."""
    for path in folder.iterdir():
        if path not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def ensure_bundle(kind: Kind, num_layers: int, folder: Path) -> Path:
    """Makes the bundle unless it is there. Raises KrasisError if there is too little room."""
    path = bundle(kind, num_layers, folder)
    if not (path / MANIFEST).exists():
        shutil.rmtree(path, ignore_errors=True)
        make_bundle(kind.request(num_layers), path)
    return path


def ensure_gguf(kind: Kind, num_layers: int, folder: Path) -> Path:
    """Makes the GGUF unless it is there."""
    path = gguf(kind, num_layers, folder)
    if not path.exists():
        make_gguf(kind.with_layers(num_layers), kind.expert_type, path)
    return path
