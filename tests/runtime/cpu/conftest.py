"""Small random models: their weights packed in memory, and transformers' float32 model of the dequantised
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from krasis.formats.architecture import Architecture, RopeScaling
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout
from krasis.formats.layouts.matrix import MatrixView, bf16_to_float32, float32_to_bf16
from krasis.formats.models.uniform import spec_of
from krasis.formats.native import Pool
from krasis.runtime.cpu.weights import FloatWeight, Int8Weight, LayerWeights, ModelWeights

Array = npt.NDArray[Any]


def architecture(**changes: Any) -> Architecture:
    """A model of few, odd sizes."""
    record: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "num_layers": 2,
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "expert_intermediate_size": 128,
        "vocab_size": 203,
        "max_positions": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": RopeScaling(),
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    return Architecture(**{**record, **changes})


SHAPES = {
    "grouped heads": architecture(),
    "yarn, as many kv heads, weights not normalised": architecture(
        num_layers=3,
        hidden_size=192,
        num_heads=3,
        num_kv_heads=3,
        head_dim=64,
        num_experts=5,
        num_experts_per_token=3,
        expert_intermediate_size=64,
        vocab_size=96,
        rope_scaling=RopeScaling("yarn", 4.0, 64),
        norm_topk_prob=False,
    ),
}


class Packer:
    """Random weights packed as a bundle has them."""

    def __init__(
        self, shape: Architecture, experts: CpuTileLayout | MarlinLayout, pool: Pool, seed: int = 0
    ) -> None:
        self.shape, self.experts, self.pool = shape, experts, pool
        self.random = np.random.default_rng(seed)

    def bf16(self, *shape: int, scale: float = 0.05, mean: float = 0.0) -> Array:
        return float32_to_bf16(mean + scale * self.random.standard_normal(shape, dtype=np.float32))

    def norm(self, size: int) -> Array:
        return bf16_to_float32(self.bf16(size, scale=0.2, mean=1.0))

    def int8(self, n: int, k: int) -> Int8Weight:
        rows = -(-n // 32) * 32
        matrix = np.zeros((rows, k), dtype=np.uint16)
        matrix[:n] = self.bf16(n, k)
        codes = np.zeros((rows // 32, k // 4, 32, 4), dtype=np.int8)
        scales = np.zeros(rows, dtype=np.float32)
        Int8RowsLayout().pack(self.pool, MatrixView(matrix, "BF16"), codes, scales)
        return Int8Weight(codes, scales)

    def expert_records(self) -> Array:
        hidden, inner = self.shape.hidden_size, self.shape.expert_intermediate_size
        record_bytes = self.experts.expert_record(hidden, inner).record_bytes
        records = np.zeros((self.shape.num_experts, record_bytes), dtype=np.uint8)
        for record in records:
            parts = [self.bf16(inner, hidden), self.bf16(inner, hidden), self.bf16(hidden, inner)]
            self.experts.pack_expert(self.pool, *[MatrixView(part, "BF16") for part in parts], record)
        return records

    def layer(self) -> LayerWeights:
        a = self.shape
        tensors = {
            "attention.norm": self.norm(a.hidden_size),
            "attention.qkv": self.int8(a.qkv_rows, a.hidden_size),
            "attention.q_norm": self.norm(a.head_dim),
            "attention.k_norm": self.norm(a.head_dim),
            "attention.output": self.int8(a.hidden_size, a.attention_size),
            "experts.norm": self.norm(a.hidden_size),
            "experts.router": FloatWeight(self.bf16(a.num_experts, a.hidden_size, scale=0.2), "BF16"),
        }
        return LayerWeights(spec_of(a).layers[0], tensors, self.expert_records())

    def model(self) -> ModelWeights:
        a = self.shape
        return ModelWeights(
            spec=spec_of(a),
            embedding=FloatWeight(self.bf16(a.vocab_size, a.hidden_size, scale=1.0), "BF16"),
            layers=tuple(self.layer() for _ in range(a.num_layers)),
            final_norm=self.norm(a.hidden_size),
            lm_head=self.int8(a.vocab_size, a.hidden_size),
            expert_layout=self.experts,
        )


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two threads."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def make_weights(pool: Pool) -> Callable[..., ModelWeights]:
    """Random weights of a shape, their experts in a layout."""

    def make(
        shape: Architecture, experts: CpuTileLayout | MarlinLayout | None = None, seed: int = 0
    ) -> ModelWeights:
        return Packer(shape, experts or CpuTileLayout("q8"), pool, seed).model()

    return make


@pytest.fixture(scope="session", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Architecture:
    """Each of the shapes."""
    return SHAPES[request.param]
