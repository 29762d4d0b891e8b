"""The structure of what moves between the host's memory and the device's in decode; see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class MoveArgs(ctypes.Structure):
    """``krasis_cuda_move_args``."""

    _fields_ = (
        ("from_row", _PTR),
        ("to_row", _PTR),
        ("from_keys", _I64),
        ("from_values", _I64),
        ("to_keys", _I64),
        ("to_values", _I64),
        ("num_kv_heads", _I64),
        ("capacity", _I64),
        ("key_bytes", _I64),
        ("value_bytes", _I64),
        ("window", _I64),
        ("part", _I32),
        ("num_parts", _I32),
        ("has_scales", _I32),
        ("reserved", _I32),
    )
