"""The structures of ``csrc/krasis_cuda_index.h``: see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class IndexArgs(ctypes.Structure):
    """``krasis_cuda_index_args``."""

    _fields_ = (
        ("k", _PTR),
        ("q", _PTR),
        ("tokens", _I64),
        ("heads", _I64),
        ("dim", _I64),
        ("start", _I64),
        ("norm", _PTR),
        ("bias", _PTR),
        ("dtype", _I32),
        ("norm_dtype", _I32),
        ("eps", _F32),
        ("interleaved", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("rotary_dims", _I64),
        ("cache", _PTR),
        ("capacity", _I64),
        ("rows", _PTR),
        ("values_offset", _I64),
    )


class ChooseArgs(ctypes.Structure):
    """``krasis_cuda_choose_args``."""

    _fields_ = (
        ("q", _PTR),
        ("weights", _PTR),
        ("tokens", _I64),
        ("heads", _I64),
        ("dim", _I64),
        ("start", _I64),
        ("budget", _I64),
        ("capacity", _I64),
        ("cache", _PTR),
        ("rows", _PTR),
        ("values_offset", _I64),
        ("dtype", _I32),
        ("reserved", _I32),
        ("chosen", _PTR),
        ("scores", _PTR),
        ("score_columns", _I64),
    )
