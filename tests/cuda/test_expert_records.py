"""Expert records as the converter packs them, through the whole routed layer of GPU kernels, against float64.

The kernels' own tests (csrc/cuda/tests) pack one weight at a time by formula; here the record's sections, the
packer's bytes and the order of calls a prefill makes are what is tested.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from krasis.formats.layouts import MarlinLayout, MatrixView, bf16_to_float32, float32_to_bf16
from krasis.formats.native import DTYPE_CODES, Pool
from krasis.runtime.gpu.kernels.native import AlignArgs, MoeGemmArgs, MoeReduceArgs

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, TOKENS = 256, 128, 6, 3, 37


def to_16(values: np.ndarray, dtype: str) -> np.ndarray:
    return float32_to_bf16(values) if dtype == "BF16" else values.astype(np.float16).view(np.uint16)


def from_16(values: np.ndarray, dtype: str) -> np.ndarray:
    return bf16_to_float32(values) if dtype == "BF16" else values.view(np.float16).astype(np.float32)


def pack_experts(layout: MarlinLayout, rng: np.random.Generator, device_array: Any) -> np.ndarray:
    """Records [experts, record_bytes] of random weights."""
    record_bytes = layout.expert_record(HIDDEN, INTERMEDIATE).record_bytes
    records = device_array((NUM_EXPERTS, record_bytes), np.uint8)
    with Pool(1) as pool:
        for record in records:
            gate, up = (rng.normal(0, 0.05, (INTERMEDIATE, HIDDEN)).astype(np.float32) for _ in range(2))
            down = rng.normal(0, 0.05, (HIDDEN, INTERMEDIATE)).astype(np.float32)
            layout.pack_expert(pool, *(MatrixView(m, "F32") for m in (gate, up, down)), record)
    return records


def reference(
    layout: MarlinLayout, records: np.ndarray, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The routed layer in float64 on the dequantised weights."""
    experts = [layout.unpack_expert(record, HIDDEN, INTERMEDIATE) for record in records]
    out = np.zeros((TOKENS, HIDDEN))
    for token, choice in np.ndindex(ids.shape):
        if ids[token, choice] < 0:
            continue
        gate, up, down = (m.astype(np.float64) for m in experts[ids[token, choice]])
        g, u = gate @ x[token], up @ x[token]
        out[token] += weights[token, choice] * (down @ (g / (1 + np.exp(-g)) * u))
    return out


class Layer:
    """One routed layer on the kernels, its experts in as many groups as asked for."""

    def __init__(self, kernels: ctypes.CDLL, layout: MarlinLayout, device_array: Any, dtype: str) -> None:
        self.kernels, self.layout, self.array, self.dtype = kernels, layout, device_array, DTYPE_CODES[dtype]
        self.keep: list[np.ndarray] = []

    def at(self, array: np.ndarray) -> int:
        self.keep.append(array)
        return array.ctypes.data

    def call(self, name: str, args: ctypes.Structure) -> None:
        status = getattr(self.kernels, name)(ctypes.byref(args), None)
        assert status == 0, (name, status, self.kernels.krasis_cuda_last_error())

    def align(self, ids: np.ndarray, m_block: int) -> dict[str, int]:
        blocks = self.kernels.krasis_cuda_align_max_blocks(ids.size, NUM_EXPERTS, m_block)
        sizes = {"sorted_slots": blocks * m_block, "block_experts": blocks, "first_block": NUM_EXPERTS + 1}
        arrays = {name: self.at(self.array(size, np.int32)) for name, size in sizes.items()}
        rest = {
            name: self.at(self.array(size, np.int32))
            for name, size in (("counts", NUM_EXPERTS), ("num_invalid", 1))
        }
        args = AlignArgs(
            ids=self.at(ids), num_slots=ids.size, num_experts=NUM_EXPERTS, m_block=m_block, **arrays, **rest
        )
        self.call("krasis_cuda_moe_align", args)
        return arrays

    def run(
        self, records: np.ndarray, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, groups: int
    ) -> np.ndarray:
        record = self.layout.expert_record(HIDDEN, INTERMEDIATE)
        table = self.array(NUM_EXPERTS, np.uint64)
        table[:] = [row.ctypes.data for row in records]
        m_block = 16
        routing = self.align(ids, m_block)
        middle, slots = (
            self.array((ids.size, INTERMEDIATE), np.uint16),
            self.array((ids.size, HIDDEN), np.float32),
        )
        executed = np.zeros(1, np.int64)
        common = {
            "dtype": self.dtype,
            "scale_dtype": DTYPE_CODES[self.layout.scale_dtype],
            "expert_base": self.at(table),
            "m_block": m_block,
            "num_slots": ids.size,
            "num_experts": NUM_EXPERTS,
            **routing,
        }
        for begin in range(0, NUM_EXPERTS, NUM_EXPERTS // groups):
            part = common | {"expert_begin": begin, "expert_end": begin + NUM_EXPERTS // groups}
            w13 = MoeGemmArgs(
                activations=self.at(x), activation_stride=HIDDEN, slots_per_row=TOP_K, gated=1,
                codes_offset=record.w13_codes.offset_bytes, scales_offset=record.w13_scales.offset_bytes,
                group=self.layout.group_of(HIDDEN), k=HIDDEN, n=2 * INTERMEDIATE,
                out=self.at(middle), out_stride=INTERMEDIATE, out_dtype=self.dtype, **part,
            )  # fmt: skip
            self.call("krasis_cuda_moe_gemm", w13)
            w2 = MoeGemmArgs(
                activations=self.at(middle), activation_stride=INTERMEDIATE, slots_per_row=1,
                codes_offset=record.w2_codes.offset_bytes, scales_offset=record.w2_scales.offset_bytes,
                group=self.layout.group_of(INTERMEDIATE), k=INTERMEDIATE, n=HIDDEN,
                out=self.at(slots), out_stride=HIDDEN, out_dtype=DTYPE_CODES["F32"],
                num_executed=self.at(executed), **part,
            )  # fmt: skip
            self.call("krasis_cuda_moe_gemm", w2)
        assert executed[0] == np.count_nonzero(ids >= 0)
        out = self.array((TOKENS, HIDDEN), np.float32)
        reduce = MoeReduceArgs(
            slots=self.at(slots), ids=self.at(ids), weights=self.at(weights), out=self.at(out),
            tokens=TOKENS, top_k=TOP_K, n=HIDDEN, num_experts=NUM_EXPERTS,
        )  # fmt: skip
        self.call("krasis_cuda_moe_reduce", reduce)
        return out


@pytest.mark.parametrize(("group", "dtype"), [(128, "BF16"), (64, "F16"), (32, "BF16"), (None, "F16")])
def test_routed_layer_equals_float64_on_the_record_the_packer_wrote(
    kernels: ctypes.CDLL, device_array: Any, group: int | None, dtype: str
) -> None:
    rng = np.random.default_rng(5)
    layout = MarlinLayout(4, group, dtype)
    records = pack_experts(layout, rng, device_array)
    x = device_array((TOKENS, HIDDEN), np.uint16)
    x[:] = to_16(rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32), dtype)
    ids = device_array((TOKENS, TOP_K), np.int32)
    ids[:] = [rng.choice(NUM_EXPERTS, TOP_K, replace=False) for _ in range(TOKENS)]
    ids[4, 1] = ids[20] = -1
    weights = rng.random((TOKENS, TOP_K), np.float32)
    whole = Layer(kernels, layout, device_array, dtype).run(records, x, ids, weights, groups=1)
    streamed = Layer(kernels, layout, device_array, dtype).run(records, x, ids, weights, groups=3)
    expected = reference(layout, records, from_16(x, dtype).astype(np.float64), ids, weights)
    # Only the intermediate is rounded to 16 bits.
    limit = 3e-3 if dtype == "BF16" else 4e-4
    assert np.linalg.norm(whole - expected) < limit * np.linalg.norm(expected)
    assert np.array_equal(whole, streamed)
    assert not whole[20].any()
