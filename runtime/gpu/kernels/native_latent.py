"""The structures of ``csrc/krasis_cuda.h`` that latent attention has: see ``native``."""

from __future__ import annotations

import ctypes

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LatentArgs(ctypes.Structure):
    """``krasis_cuda_latent_args``."""

    _fields_ = (
        ("q", _PTR),
        ("kv", _PTR),
        ("q_stride", _I64),
        ("kv_stride", _I64),
        ("tokens", _I64),
        ("start", _I64),
        ("num_heads", _I64),
        ("nope_dim", _I64),
        ("rope_dim", _I64),
        ("kv_rank", _I64),
        ("norm", _PTR),
        ("dtype", _I32),
        ("norm_dtype", _I32),
        ("eps", _F32),
        ("interleaved", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("rotary_dims", _I64),
        ("temperature_scale", _F32),
        ("reserved", _I32),
        ("temperature_shift", _I64),
        ("temperature_period", _I64),
        ("cache", _PTR),
        ("capacity", _I64),
        ("rows", _PTR),
        ("keys_offset", _I64),
    )


class Int8HeadsArgs(ctypes.Structure):
    """``krasis_cuda_int8_heads_args``."""

    _fields_ = (
        ("x", _PTR),
        ("x_stride", _I64),
        ("x_head_stride", _I64),
        ("tokens", _I64),
        ("num_heads", _I64),
        ("k", _I64),
        ("n", _I64),
        ("dtype", _I32),
        ("reserved", _I32),
        ("weight", _PTR),
        ("scales", _PTR),
        ("out", _PTR),
        ("out_stride", _I64),
        ("out_head_stride", _I64),
    )


class LatentAttentionArgs(ctypes.Structure):
    """``krasis_cuda_latent_attention_args``."""

    _fields_ = (
        ("q_latent", _PTR),
        ("q_rope", _PTR),
        ("out", _PTR),
        ("q_stride", _I64),
        ("q_head_stride", _I64),
        ("num_rows", _I64),
        ("num_heads", _I64),
        ("kv_rank", _I64),
        ("rope_dim", _I64),
        ("capacity", _I64),
        ("start", _I64),
        ("splits", _I64),
        ("cache", _PTR),
        ("rows", _PTR),
        ("keys_offset", _I64),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("dtype", _I32),
        ("scale", _F32),
        ("chosen", _PTR),
        ("budget", _I64),
    )
