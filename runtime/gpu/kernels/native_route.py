"""ctypes structure of ``csrc/krasis_cuda.h`` for the choice of experts."""

from __future__ import annotations

import ctypes

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class RouteArgs(ctypes.Structure):
    """``krasis_cuda_route_args``."""

    _fields_ = (
        ("logits", _PTR),
        ("tokens", _I64),
        ("num_experts", _I64),
        ("top_k", _I64),
        ("normalize", _I32),
        ("score", _I32),
        ("ids", _PTR),
        ("weights", _PTR),
        ("resident", _PTR),
        ("gpu_ids", _PTR),
        ("cpu_ids", _PTR),
        ("counts", _PTR),
        ("logit_bias", _PTR),
        ("correction", _PTR),
        ("expert_scale", _PTR),
        ("logit_cap", _F32),
        ("scale", _F32),
        ("sum_floor", _F32),
        ("sum_epsilon", _F32),
        ("groups", _I32),
        ("top_groups", _I32),
        ("group_score", _I32),
        ("reserved", _I32),
    )
