"""FP4 (E2M1), two codes a byte: NVFP4 as ModelOpt and compressed-tensors write it, MXFP4 as
compressed-tensors, DeepSeek and gpt-oss do.
"""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.kept import KeptCodes
from krasis.formats.checkpoints.quantised.rows import FP4_TABLE, RowsWeight, fit_grid
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors

_EXPONENTS = ("U8", "F8_E8M0")
_PARTS = ("_scale", "_scales", "_scale_inv", "_shape", "_zero_point", "_packed", "_blocks", ".scale")


@dataclass(frozen=True, slots=True)
class Fp4Reader:
    """Weights of bytes with scales for 32 weights (powers of two: MXFP4) or for 16 (E4M3: NVFP4)."""

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if tensors.infos[name].dtype not in ("U8", "I8"):
            return None
        if name.endswith("_blocks"):
            return _blocks(name, tensors)
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
        elif name.endswith(_PARTS):
            return None
        else:
            base = name
        own_name = f"{name[:-7]}.scale" if name.endswith(".weight") else f"{base}_scale"
        scale = tensors.need(name, f"{base}_scale", own_name)
        codes = tensors.codes(name, 2, 3)
        return Found(base, _weight(codes, (*codes.shape[:-1], 2 * codes.shape[-1]), scale, base, tensors))


def _blocks(name: str, tensors: Tensors) -> Found:
    """gpt-oss: [experts, n, k / 32, 16] with [experts, n, k / 32]."""
    base = name.removesuffix("_blocks")
    codes = tensors.codes(name, 4)
    scale = tensors.need(name, f"{base}_scales")
    if codes.shape[-1] != 16:
        raise codes.wrong_shape("blocks of 16 bytes")
    if scale.shape != codes.shape[:-1]:
        raise scale.wrong_shape(str(list(codes.shape[:-1])))
    shape = (*codes.shape[:-2], 32 * codes.shape[-2])
    return Found(base, _weight(codes, shape, scale, base, tensors))


def _weight(codes: Stored, shape: tuple[int, ...], scale: Stored, base: str, tensors: Tensors) -> RowsWeight:
    is_mx = scale.dtype in _EXPONENTS
    if not is_mx:
        scale.check_dtype("F8_E4M3", *_EXPONENTS)
    group = 32 if is_mx else 16
    if scale.shape != (*shape[:-1], shape[-1] // group) or shape[-1] % group:
        raise scale.wrong_shape(f"a scale for {group} of weights {list(shape)}")
    grid = fit_grid(scale, shape, ((1, group),))
    factor, divides = None, False
    if not is_mx:
        divides = tensors.find(f"{base}_global_scale") is not None
        factor = tensors.need(codes.name, f"{base}_global_scale", f"{base}_scale_2")
        factor.check_dtype("F32", "BF16", "F16")
        if factor.shape not in ((), (1,), shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1)):
            raise factor.wrong_shape("one number a matrix")
    return RowsWeight(
        dtype="mxfp4" if is_mx else "nvfp4",
        shape=shape,
        codes=codes,
        table=FP4_TABLE,
        scales=grid,
        factor=factor,
        divides=divides,
    )


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` mxfp4."""
    return Quantisation("MXFP4", (Fp4Reader(),), KeptCodes(mxfp4=True))
