"""Small bundles of random expert records, and registrars that keep count or refuse."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from krasis.formats.architecture import Architecture, RopeScaling
from krasis.formats.bundle.manifest import Manifest
from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.writer import BlobSpec, BundleWriter, plan_shards
from krasis.formats.layouts import layout_from_id
from krasis.formats.models.uniform import spec_of
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.host_memory import registrar as registrar_module
from krasis.runtime.host_memory.registrar import RegistrationError

HIDDEN, INNER, LAYERS, EXPERTS = 256, 128, 3, 5
LAYOUT = "marlin-u4b8-g32-bf16"
RECORD = layout_from_id(LAYOUT).expert_record(HIDDEN, INNER).record_bytes
PAGE = 4096


def write_bundle(final: Path, shard_bytes: int = 2**35, tiers: tuple[str, ...] = ("dense", "gpu")) -> Path:
    """GPU experts of random bytes; of the dense tier only an embedding."""
    blobs = [BlobSpec("embedding", "dense", "BF16", (96, HIDDEN), "plain")]
    if "gpu" in tiers:
        blobs += [
            BlobSpec(f"layers.{layer}.experts.gpu", "gpu", "U8", (EXPERTS, RECORD), LAYOUT)
            for layer in range(LAYERS)
        ]
    plan = plan_shards(blobs, shard_bytes)
    random = np.random.default_rng(11)
    digests = {}
    with BundleWriter(final.with_suffix(".partial"), plan) as writer:
        writer.create()
        for blob in blobs:
            with writer.open_blob(blob.name) as sink:
                sink.write(random.integers(0, 256, blob.num_bytes, dtype=np.uint8))
                digests[blob.name] = sink.close()
        manifest = Manifest(
            tool_version="0",
            spec=spec_of(architecture()),
            layouts={tier: LAYOUT if tier == "gpu" else "int8-rows-r32k4" for tier in tiers},
            files=plan.file_records(),
            blobs=plan.blob_records(digests),
            assets=(),
            sources=(),
            recipe={},
            quality={},
        )
        writer.finish(manifest, final)
    return final


def architecture() -> Architecture:
    return Architecture(
        model_type="qwen3_moe",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_token=2,
        expert_intermediate_size=INNER,
        vocab_size=96,
        max_positions=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=RopeScaling(),
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def raw_experts(path: Path) -> np.ndarray:
    """uint8 [layers, experts, record_bytes] read from the files by the manifest's offsets, by NumPy."""
    layers = []
    with Bundle.open(path) as bundle:
        for layer in range(LAYERS):
            blob = bundle.blob(f"layers.{layer}.experts.gpu")
            data = np.fromfile(path / blob.file, np.uint8, blob.num_bytes, offset=blob.offset_bytes)
            layers.append(data.reshape(EXPERTS, RECORD))
    return np.stack(layers)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, one GPU shard."""
    return write_bundle(tmp_path_factory.mktemp("experts") / "small.krasis")


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, a shard for each layer."""
    return write_bundle(tmp_path_factory.mktemp("experts") / "shards.krasis", 4 * 2**20)


@pytest.fixture(scope="session")
def expected(pristine: Path) -> np.ndarray:
    """What every store of the bundles must hold."""
    return raw_experts(pristine)


@pytest.fixture
def bundle(pristine: Path) -> Iterator[Bundle]:
    """Opened."""
    with Bundle.open(pristine) as opened:
        yield opened


@pytest.fixture
def make_bundle() -> Callable[..., Path]:
    """Writes one."""
    return write_bundle


@pytest.fixture
def own_bundle(tmp_path: Path) -> Path:
    """To damage."""
    return write_bundle(tmp_path / "own.krasis")


@pytest.fixture
def in_ram() -> Iterator[Path]:
    """A bundle on tmpfs."""
    import shutil
    import tempfile

    shm = Path("/dev/shm")  # noqa: S108
    if not os.access(shm, os.W_OK):
        pytest.skip(f"{shm} cannot be written")
    folder = Path(tempfile.mkdtemp(prefix="krasis-test-", dir=shm))
    try:
        yield write_bundle(folder / "small.krasis")
    finally:
        shutil.rmtree(folder)


class Ledger:
    """A registrar that checks what it gets and remembers it. refuse(count, read_only): whether to refuse the
    count-th call."""

    name = "ledger"

    def __init__(self, refuse: Callable[[int, bool], bool] = lambda count, read_only: False) -> None:
        self.refuse = refuse
        self.count = 0
        self.held: dict[int, int] = {}
        self.history: list[tuple[int, int, bool]] = []
        self._lock = threading.Lock()

    def register(self, memory: torch.Tensor, *, read_only: bool) -> None:
        begin, size = memory.data_ptr(), memory.numel()
        with self._lock:
            self.count += 1
            if memory.dtype != torch.uint8 or begin % PAGE or size % PAGE or size == 0:
                raise ValueError(f"not whole pages: {begin:#x}, {size}")
            if any(begin < held + length and held < begin + size for held, length in self.held.items()):
                raise ValueError("registered twice")
            if self.refuse(self.count, read_only):
                raise RegistrationError("refused by the test", got=f"call {self.count}")
            self.held[begin] = size
            self.history.append((begin, size, read_only))

    def unregister(self, memory: torch.Tensor) -> None:
        with self._lock:
            if self.held.pop(memory.data_ptr(), None) != memory.numel():
                raise ValueError("was not registered")

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether one registration covers all of a tensor."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
        return any(held <= begin and end <= held + size for held, size in self.held.items())


@pytest.fixture
def ledger() -> Ledger:
    """Refuses nothing."""
    return Ledger()


@pytest.fixture
def make_ledger() -> type[Ledger]:
    """To make one that refuses."""
    return Ledger


@pytest.fixture
def device() -> Iterator[DeviceDouble]:
    """Runs copies late."""
    double = DeviceDouble(policy="late")
    yield double
    double.close()


@pytest.fixture
def memlock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what RLIMIT_MEMLOCK seems to be."""

    def limit(num_bytes: int) -> None:
        monkeypatch.setattr(registrar_module.resource, "getrlimit", lambda _: (num_bytes, num_bytes))

    return limit
