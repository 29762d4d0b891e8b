"""A tiny model on the device's double: both tiers of its experts, all in host memory, and a decoder of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from krasis.formats.architecture import Architecture, RopeScaling
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout
from krasis.formats.layouts.matrix import MatrixView, bf16_to_float32, float32_to_bf16
from krasis.formats.models.uniform import spec_of
from krasis.formats.native import Pool
from krasis.runtime.cpu.weights import FloatWeight, Int8Weight, LayerWeights, ModelWeights
from krasis.runtime.device.api import Stream
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu.decode import HybridDecoder
from krasis.runtime.gpu.experts.host_experts import CpuTier
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.many_rows import ManyRows
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.weights import load_gpu_weights
from tests.support.host_store import HostStore
from tests.support.patience import PATIENCE_S

Array = npt.NDArray[Any]
CAPACITY = 24

SHAPE = Architecture(
    model_type="qwen3_moe",
    num_layers=3,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=6,
    num_experts_per_token=2,
    expert_intermediate_size=64,
    vocab_size=90,
    max_positions=64,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(),
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
CPU_LAYOUT = CpuTileLayout("q8")
GPU_LAYOUT = MarlinLayout(group=32, scale_dtype="BF16")


@dataclass(frozen=True)
class Model:
    """The same dense weights twice, with the experts of either tier."""

    cpu: ModelWeights
    gpu: ModelWeights

    def mixed(self, on_gpu: set[tuple[int, int]]) -> ModelWeights:
        """For the reference: experts (layer, expert) of the gpu tier where on_gpu says so, else of the cpu
        tier."""
        layers = []
        for index, (own, other) in enumerate(zip(self.cpu.layers, self.gpu.layers, strict=True)):
            records = [
                (GPU_LAYOUT, other.experts[e]) if (index, e) in on_gpu else (CPU_LAYOUT, own.experts[e])
                for e in range(SHAPE.num_experts)
            ]
            layers.append(replace(own, experts=records))
        return replace(self.cpu, layers=tuple(layers), expert_layout=_AnyTier())


class _AnyTier:
    @staticmethod
    def unpack_expert(record: tuple[Any, Array], hidden: int, intermediate: int) -> Any:
        layout, data = record
        return layout.unpack_expert(data, hidden, intermediate)


class _Packer:
    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool, self.random = pool, np.random.default_rng(seed)

    def bf16(self, *shape: int, scale: float = 0.05, mean: float = 0.0) -> Array:
        return float32_to_bf16(mean + scale * self.random.standard_normal(shape, dtype=np.float32))

    def norm(self, size: int) -> Array:
        return bf16_to_float32(self.bf16(size, scale=0.2, mean=1.0))

    def int8(self, n: int, k: int) -> Int8Weight:
        rows = -(-n // 32) * 32
        matrix = np.zeros((rows, k), np.uint16)
        matrix[:n] = self.bf16(n, k)
        codes, scales = np.zeros((rows // 32, k // 4, 32, 4), np.int8), np.zeros(rows, np.float32)
        Int8RowsLayout().pack(self.pool, MatrixView(matrix, "BF16"), codes, scales)
        return Int8Weight(codes, scales)

    def experts(self) -> tuple[Array, Array]:
        """Records of one layer in both layouts."""
        hidden, inner = SHAPE.hidden_size, SHAPE.expert_intermediate_size
        tiers = [
            np.zeros((SHAPE.num_experts, layout.expert_record(hidden, inner).record_bytes), np.uint8)
            for layout in (CPU_LAYOUT, GPU_LAYOUT)
        ]
        for expert in range(SHAPE.num_experts):
            shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
            parts = [MatrixView(self.bf16(*shape, scale=0.08), "BF16") for shape in shapes]
            for layout, records in zip((CPU_LAYOUT, GPU_LAYOUT), tiers, strict=True):
                layout.pack_expert(self.pool, *parts, records[expert])
        return tiers[0], tiers[1]

    def model(self) -> Model:
        a, layers = SHAPE, []
        for _ in range(a.num_layers):
            cpu, gpu = self.experts()
            tensors = {
                "attention.norm": self.norm(a.hidden_size),
                "attention.qkv": self.int8(a.qkv_rows, a.hidden_size),
                "attention.q_norm": self.norm(a.head_dim),
                "attention.k_norm": self.norm(a.head_dim),
                "attention.output": self.int8(a.hidden_size, a.attention_size),
                "experts.norm": self.norm(a.hidden_size),
                # Decided, as trained ones are: near-ties would turn on the rounding of an activation.
                "experts.router": FloatWeight(self.bf16(a.num_experts, a.hidden_size, scale=0.5), "BF16"),
            }
            layer = LayerWeights(spec_of(a).layers[0], tensors, cpu)
            layers.append((layer, replace(layer, experts=gpu)))
        cpu_layers, gpu_layers = (tuple(tier) for tier in zip(*layers, strict=True))
        cpu_model = ModelWeights(
            spec=spec_of(a),
            embedding=FloatWeight(self.bf16(a.vocab_size, a.hidden_size, scale=1.0), "BF16"),
            layers=cpu_layers,
            final_norm=self.norm(a.hidden_size),
            lm_head=self.int8(a.vocab_size, a.hidden_size),
            expert_layout=CPU_LAYOUT,
        )
        return Model(cpu_model, replace(cpu_model, layers=gpu_layers, expert_layout=GPU_LAYOUT))


@dataclass
class Rig:
    """A model opened on one double."""

    device: DeviceDouble
    model: GpuModel
    product: ExpertProduct
    store: HostStore
    copies: Stream
    cpu: CpuTier

    def residency(self, num_slots: int) -> Residency:
        a = SHAPE
        return Residency(self.device, self.store, self.copies, a.num_layers, a.num_experts, num_slots)

    def decoder(self, residency: Residency | None = None, **changes: Any) -> HybridDecoder:
        arguments = {"cpu": self.cpu, "residency": residency, "timeout_s": PATIENCE_S, **changes}
        return HybridDecoder(self.model, self.product, **arguments)


@pytest.fixture(scope="session")
def shape() -> Architecture:
    """The model's architecture."""
    return SHAPE


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two threads."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiers(pool: Pool) -> Model:
    """The model's weights."""
    # A seed whose routers decide clearly for the tokens below, with either tier.
    return _Packer(pool, 9).model()


@pytest.fixture
def open_rig(tiers: Model, pool: Pool) -> Iterator[Callable[..., Rig]]:
    """open_rig(dtype, **of DeviceDouble)."""
    opened: list[Rig] = []

    def open_one(dtype: torch.dtype = torch.float16, **changes: Any) -> Rig:
        device = DeviceDouble(**{"total_bytes": 64 * 2**20, **changes})
        stream = device.stream("compute")
        weights = load_gpu_weights(tiers.gpu, device, stream, SHAPE.max_positions)
        cache = GpuKvCache(device, stream, spec_of(SHAPE), CAPACITY, dtype)
        kernels = GpuKernels(device)
        model = GpuModel(
            spec=spec_of(SHAPE),
            device=device,
            kernels=kernels,
            many_rows=ManyRows(kernels, None),
            weights=weights,
            cache=cache,
            dtype=dtype,
            stream=stream,
        )
        product = ExpertProduct(kernels, SHAPE, GPU_LAYOUT, weights.record)
        store = HostStore(device, [layer.experts for layer in tiers.gpu.layers])
        rig = Rig(device, model, product, store, device.stream("copy"), CpuTier(tiers.cpu, pool))
        opened.append(rig)
        return rig

    yield open_one
    for rig in opened:
        rig.device.close()


@pytest.fixture(scope="session")
def tokens() -> list[int]:
    """A few token ids."""
    return np.random.default_rng(3).integers(0, SHAPE.vocab_size, 7).tolist()
