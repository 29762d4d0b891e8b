"""ctypes structures of ``csrc/krasis_cuda.h`` for launches that do the work of several."""

from __future__ import annotations

import ctypes

from krasis.runtime.gpu.kernels.native_route import RouteArgs

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class NormInt8Args(ctypes.Structure):
    """``krasis_cuda_norm_int8_args``."""

    _fields_ = (
        ("hidden", _PTR),
        ("norm", _PTR),
        ("k", _I64),
        ("n", _I64),
        ("norm_dtype", _I32),
        ("dtype", _I32),
        ("out_dtype", _I32),
        ("eps", _F32),
        ("weight", _PTR),
        ("scales", _PTR),
        ("out", _PTR),
    )


class NormRouteArgs(ctypes.Structure):
    """``krasis_cuda_norm_route_args``."""

    _fields_ = (
        ("hidden", _PTR),
        ("norm", _PTR),
        ("x", _PTR),
        ("normed", _PTR),
        ("weight", _PTR),
        ("k", _I64),
        ("norm_dtype", _I32),
        ("x_dtype", _I32),
        ("weight_dtype", _I32),
        ("eps", _F32),
        ("arrivals", _PTR),
        ("route", RouteArgs),
    )
