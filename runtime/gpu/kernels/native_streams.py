"""The structures of ``csrc/krasis_cuda_streams.h``, and its functions: see ``native``."""

from __future__ import annotations

import ctypes
from typing import Any

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class StreamNormArgs(ctypes.Structure):
    """``krasis_cuda_stream_norm_args``."""

    _fields_ = (
        ("x", _PTR),
        ("weight", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("streams", _I64),
        ("k", _I64),
        ("weight_dtype", _I32),
        ("eps", _F32),
    )


class StreamSquashArgs(ctypes.Structure):
    """``krasis_cuda_stream_squash_args``."""

    _fields_ = (("x", _PTR), ("count", _I64), ("scale", _F32), ("reserved", _I32))


class StreamMixArgs(ctypes.Structure):
    """``krasis_cuda_stream_mix_args``."""

    _fields_ = (
        ("normed", _PTR),
        ("gates", _PTR),
        ("tokens", _I64),
        ("streams", _I64),
        ("k", _I64),
        ("out", _PTR),
        ("x", _PTR),
        ("cleared", _PTR),
        ("x_dtype", _I32),
        ("reserved", _I32),
    )


class StreamAddArgs(ctypes.Structure):
    """``krasis_cuda_stream_add_args``."""

    _fields_ = (
        ("x", _PTR),
        ("added", _PTR),
        ("logits", _PTR),
        ("tokens", _I64),
        ("streams", _I64),
        ("k", _I64),
    )


class TableWeighArgs(ctypes.Structure):
    """``krasis_cuda_table_weigh_args``."""

    _fields_ = (
        ("x", _PTR),
        ("keys", _PTR),
        ("values", _PTR),
        ("key_norm", _PTR),
        ("query_norm", _PTR),
        ("conv_norm", _PTR),
        ("gated", _PTR),
        ("normed", _PTR),
        ("tokens", _I64),
        ("streams", _I64),
        ("k", _I64),
        ("norm_dtype", _I32),
        ("eps", _F32),
    )


class TableAddArgs(ctypes.Structure):
    """``krasis_cuda_table_add_args``."""

    _fields_ = (
        ("x", _PTR),
        ("gated", _PTR),
        ("normed", _PTR),
        ("conv", _PTR),
        ("tokens", _I64),
        ("channels", _I64),
        ("width", _I64),
        ("dilation", _I64),
        ("past", _PTR),
        ("start", _I64),
        ("rows", _PTR),
        ("past_offset", _I64),
    )


STREAM_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "stream_norm": (_I32, (_PTR, _PTR)),
    "stream_squash": (_I32, (_PTR, _PTR)),
    "stream_mix": (_I32, (_PTR, _PTR)),
    "stream_add": (_I32, (_PTR, _PTR)),
    "table_weigh": (_I32, (_PTR, _PTR)),
    "table_add": (_I32, (_PTR, _PTR)),
}
