"""The structure of what ranks of a host hand to each other; see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _U64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


class TakeArgs(ctypes.Structure):
    """``krasis_cuda_take_args``."""

    _fields_ = (
        ("flag", _PTR),
        ("epoch", _PTR),
        ("timeout_ns", _I64),
        ("timeouts", _PTR),
        ("tag", _U64),
        ("normed", _PTR),
        ("ids", _PTR),
        ("weights", _PTR),
        ("held", _PTR),
        ("rows", _I64),
        ("columns", _I64),
        ("top_k", _I64),
        ("num_experts", _I32),
        ("dtype", _I32),
        ("x", _PTR),
        ("own_ids", _PTR),
        ("own_weights", _PTR),
        ("counts", _PTR),
        ("zeros", _PTR),
    )
