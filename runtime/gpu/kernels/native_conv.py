"""The structure of ``csrc/krasis_cuda.h`` that short convolutions have: see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


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
