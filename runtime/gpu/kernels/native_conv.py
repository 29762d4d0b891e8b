"""The structures of ``csrc/krasis_cuda.h`` that short convolutions and Mamba-2 have: see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class ShortConvArgs(ctypes.Structure):
    """``krasis_cuda_short_conv_args``."""

    _fields_ = (
        ("x", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("channels", _I64),
        ("width", _I64),
        ("conv", _PTR),
        ("columns", _PTR),
        ("start", _I64),
        ("rows", _PTR),
        ("columns_offset", _I64),
        ("dtype", _I32),
        ("reserved", _I32),
    )


class Mamba2Args(ctypes.Structure):
    """``krasis_cuda_mamba2_args``."""

    _fields_ = (
        ("x", _PTR),
        ("steps", _PTR),
        ("mixed", _PTR),
        ("scanned", _PTR),
        ("out", _PTR),
        ("ldx", _I64),
        ("tokens", _I64),
        ("heads", _I64),
        ("head_dim", _I64),
        ("state_dim", _I64),
        ("groups", _I64),
        ("conv_width", _I64),
        ("conv", _PTR),
        ("conv_bias", _PTR),
        ("a_log", _PTR),
        ("dt_bias", _PTR),
        ("skip", _PTR),
        ("gate_norm", _PTR),
        ("dtype", _I32),
        ("norm_dtype", _I32),
        ("eps", _F32),
        ("min_step", _F32),
        ("matrices", _PTR),
        ("columns", _PTR),
        ("start", _I64),
        ("rows", _PTR),
        ("matrices_offset", _I64),
        ("columns_offset", _I64),
    )
