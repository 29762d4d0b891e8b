"""Weights quantised as other programs do, in plain NumPy, for machines without those programs.

What the numbers mean is checked elsewhere against what the programs wrote (tests/assets/quantised).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[str, Array]]
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Quantised:
    """tensors: (type, array) by what stands behind the module's name and a dot. values: float32."""

    tensors: Tensors
    values: Array


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantise: the settings of a checkpoint, and what becomes of a weight [n, k]."""

    settings: dict[str, Any]
    write: Callable[[Array], Quantised]


def nibbles(codes: Array) -> Array:
    """Two codes a byte, the first in the low half."""
    packed: Array = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return packed


def words(codes: Array, bits: int, order: tuple[int, ...] = tuple(range(32))) -> Array:
    """Codes of the last axis in 32-bit words, code ``order[i]`` of a word at its i-th place."""
    per_word = 32 // bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint64)
    shifted = [grouped[..., order[i]] << np.uint64(bits * i) for i in range(per_word)]
    return np.bitwise_or.reduce(np.stack(shifted), axis=0).astype(np.uint32).view(np.int32)


def packed_int(weight: Array, group: int, bits: int = 4, stretch: float = 1) -> Quantised:
    """compressed-tensors' pack-quantized, symmetric. stretch: of scales, which then leave codes unused."""
    n, k = weight.shape
    half = 1 << bits - 1
    blocks = weight.reshape(n, -1, group)
    scales = (np.abs(blocks).max(-1) * stretch / (half - 1)).astype(np.float16)
    codes = np.clip(np.rint(blocks / scales[..., None].astype(np.float32)), -half, half - 1) + 0.0  # no -0
    values = (codes * scales[..., None].astype(np.float32)).reshape(n, k)
    stored = words((codes + half).reshape(n, k).astype(np.uint8), bits)
    shape = np.array([n, k], np.int64)
    tensors: Tensors = {
        "weight_packed": ("I32", stored),
        "weight_scale": ("F16", scales),
        "weight_shape": ("I64", shape),
    }
    return Quantised(tensors, values.astype(np.float32))


def _by_inputs(weight: Array, group: int, order: Array) -> tuple[Array, Array, Array]:
    """(codes [k, n], zeros [groups, n], scales [groups, n]) of 4 bits, asymmetric."""
    n, k = weight.shape
    codes = np.zeros((k, n), np.uint8)
    zeros, scales = np.zeros((k // group, n), np.uint8), np.zeros((k // group, n), np.float16)
    for one in range(k // group):
        part = weight[:, order == one]
        most, least = part.max(1).clip(min=0), part.min(1).clip(max=0)
        scales[one] = (most - least) / 15
        scale = scales[one].astype(np.float32)
        zeros[one] = np.clip(np.rint(-least / scale), 1, 15)
        codes[order == one] = np.clip(np.rint(part / scale[:, None]) + zeros[one][:, None], 0, 15).T
    return codes, zeros, scales


def gptq(weight: Array, group: int = 64, *, act_order: bool = True) -> Quantised:
    """GPTQ of the first version: zero points less one."""
    k = weight.shape[1]
    order = np.arange(k) // group
    if act_order:
        order = np.random.default_rng(k).permutation(order)
    codes, zeros, scales = _by_inputs(weight, group, order)
    values = (codes.astype(np.float32) - zeros.astype(np.float32)[order]) * scales.astype(np.float32)[order]
    tensors: Tensors = {
        "qweight": ("I32", words(codes.T, 4).T),
        "qzeros": ("I32", words(zeros - 1, 4)),
        "scales": ("F16", scales),
        "g_idx": ("I32", order.astype(np.int32)),
    }
    return Quantised(tensors, np.ascontiguousarray(values.T))


def gptq_symmetric(weight: Array, group: int, form: str = "gptq") -> Quantised:
    """Symmetric codes, in GPTQ's form or AWQ's."""
    n, k = weight.shape
    blocks = weight.reshape(n, -1, group)
    scales = (np.abs(blocks).max(-1) / 7).astype(np.float16)
    steps = scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(blocks / steps), -8, 7) + 0.0
    stored = (codes + 8).reshape(n, k).astype(np.uint8)
    zeros = np.full((k // group, n), 8, np.uint8)
    values = (codes * steps).reshape(n, k).astype(np.float32)
    if form == "awq":
        parts = words(stored.T, 4, AWQ_NIBBLES), words(zeros, 4, AWQ_NIBBLES)
    else:
        parts = words(stored, 4).T, words(zeros - 1, 4)
    held = scales.T
    return Quantised(
        {"qweight": ("I32", parts[0]), "qzeros": ("I32", parts[1]), "scales": ("F16", held)}, values
    )


def awq(weight: Array, group: int = 64) -> Quantised:
    """AutoAWQ's GEMM form."""
    order = np.arange(weight.shape[1]) // group
    codes, zeros, scales = _by_inputs(weight, group, order)
    values = (codes.astype(np.float32) - zeros.astype(np.float32)[order]) * scales.astype(np.float32)[order]
    tensors: Tensors = {
        "qweight": ("I32", words(codes, 4, AWQ_NIBBLES)),
        "qzeros": ("I32", words(zeros, 4, AWQ_NIBBLES)),
        "scales": ("F16", scales),
    }
    return Quantised(tensors, np.ascontiguousarray(values.T))


def _fp4(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """(codes, values) of blocks [.., size] with a scale each."""
    scaled = np.abs(blocks) / scales[..., None]
    codes = np.abs(scaled[..., None] - _FP4).argmin(-1)
    signs = blocks < 0
    values = np.where(signs, -1, 1) * _FP4[codes] * scales[..., None]
    return (codes | signs << 3).astype(np.uint8), values.astype(np.float32)


def mxfp4(weight: Array, names: tuple[str, str] = ("weight_packed", "weight_scale")) -> Quantised:
    """MXFP4 in bytes of two codes."""
    n, k = weight.shape
    blocks = weight.reshape(n, -1, 32)
    exponents = np.ceil(np.log2(np.abs(blocks).max(-1) / 6))
    codes, values = _fp4(blocks, 2.0**exponents)
    tensors: Tensors = {
        names[0]: ("U8", nibbles(codes).reshape(n, k // 2)),
        names[1]: ("U8", (exponents + 127).astype(np.uint8)),
    }
    return Quantised(tensors, values.reshape(n, k))


def e4m3(values: Array) -> tuple[Array, Array]:
    """(codes, values) of numbers rounded to E4M3."""
    import torch

    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy(), rounded.float().numpy()


def nvfp4(weight: Array, *, divided: bool) -> Quantised:
    """NVFP4 as ModelOpt writes it, or as compressed-tensors does (``divided``)."""
    n, k = weight.shape
    blocks = weight.reshape(n, -1, 16)
    factor = np.float32(np.abs(weight).max() / (6 * 448))
    kept = np.float32(1 / factor) if divided else factor
    raw, scales = e4m3(np.abs(blocks).max(-1) / 6 / factor)
    whole = scales / kept if divided else scales * kept
    codes, _ = _fp4(blocks, np.maximum(whole, 1e-30))
    values = np.where(codes & 8, -1, 1).astype(np.float32) * _FP4[codes & 7].astype(np.float32)
    prefix = "weight_packed" if divided else "weight"
    tensors: Tensors = {
        prefix: ("U8", nibbles(codes).reshape(n, k // 2)),
        "weight_scale": ("F8_E4M3", raw),
        ("weight_global_scale" if divided else "weight_scale_2"): ("F32", np.array([kept], np.float32)),
    }
    return Quantised(tensors, (values * whole[..., None]).reshape(n, k))


def fp8(weight: Array, rows: int, columns: int, name: str, dtype: str = "F32") -> Quantised:
    """FP8 with a scale for ``rows`` x ``columns`` weights, the last ones cut."""
    n, k = weight.shape
    padded = np.zeros((-(-n // rows) * rows, -(-k // columns) * columns), np.float32)
    padded[:n, :k] = weight
    blocks = padded.reshape(-(-n // rows), rows, -(-k // columns), columns)
    scales = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
    if dtype == "BF16":
        scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    spread = scales.repeat(rows, 0).repeat(columns, 1)[:n, :k]
    codes, values = e4m3(weight / spread)
    kept = scales if dtype == "F32" else (scales.view(np.uint32) >> 16).astype(np.uint16)
    return Quantised({"weight": ("F8_E4M3", codes), name: (dtype, kept)}, values * spread)


def compressed_tensors(form: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """Settings of compressed-tensors."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(_FP8, lambda weight: fp8(weight, 128, 128, "weight_scale_inv", "BF16")),
    "fp8_channel": Scheme(
        compressed_tensors("float-quantized", 8, "float", "channel"),
        lambda weight: fp8(weight, 1, weight.shape[1], "weight_scale"),
    ),
    "int4": Scheme(
        compressed_tensors("pack-quantized", 4, "int", "group", group_size=32),
        lambda weight: packed_int(weight, 32),
    ),
    "gptq": Scheme(_GPTQ, gptq),
    "awq": Scheme(_AWQ, awq),
    "mxfp4": Scheme(compressed_tensors("mxfp4-pack-quantized", 4, "float", "group", group_size=32), mxfp4),
    "nvfp4": Scheme(
        compressed_tensors("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16),
        lambda weight: nvfp4(weight, divided=True),
    ),
    "modelopt": Scheme(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda weight: nvfp4(weight, divided=False)
    ),
}
