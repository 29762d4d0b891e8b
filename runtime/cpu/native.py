"""ctypes prototypes of the compute functions and structures of ``csrc/krasis.h``; nothing here checks arrays.

``prototype(name)`` gives a function of the loaded library with its argument types set once. Pointers are
plain integers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from krasis.formats.errors import NativeError
from krasis.formats.native import library

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

# Words of the records of formats.models, and of the KV cache, as the enums of krasis.h.
SCORE_CODES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "softmax_of_top": 3, "sigmoid_of_top": 4}
ACTIVATION_CODES = {
    "silu": 0,
    "gelu_tanh": 1,
    "swiglu_offset": 2,
    "silu_clamped_before": 3,
    "silu_clamped_after": 4,
    "relu_squared": 5,
}
KV_CODES = {"f32": 0, "f16": 2, "int8": 3}
NORM_CODES = {"head": 1, "flat": 2, "head_after_rope": 3}
GATE_CODES = {"silu": 0, "sigmoid": 1}
STYLE_CODES = {"half": 0, "interleaved": 1}


class ActsStruct(ctypes.Structure):
    """``krasis_acts``: int8 activations with a scale and a sum per block of 32."""

    _fields_ = (("q", _PTR), ("scale", _PTR), ("sum", _PTR), ("tokens", _I64), ("k", _I64))


class SpanStruct(ctypes.Structure):
    """``krasis_span``: rows of one sequence, and its slot's memory."""

    _fields_ = (("first_row", _I64), ("rows", _I64), ("start", _I64), ("keys", _PTR), ("values", _PTR))


class QkvArgs(ctypes.Structure):
    """``krasis_qkv_args``."""

    _fields_ = (
        ("qkv", _PTR),
        ("tokens", _I64),
        ("num_heads", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("bias", _PTR),
        ("q_norm", _PTR),
        ("k_norm", _PTR),
        ("norm", _I32),
        ("eps", _F32),
        ("clip", _F32),
        ("rope_style", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("rotary_dims", _I64),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("keys_offset_bytes", _I64),
        ("values_offset_bytes", _I64),
        ("capacity", _I64),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("shared_kv", _I32),
        ("value_norm", _I32),
        ("ring", _I64),
    )


class AttentionArgs(ctypes.Structure):
    """``krasis_attention_args``."""

    _fields_ = (
        ("q", _PTR),
        ("ldq", _I64),
        ("tokens", _I64),
        ("num_heads", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("keys_offset_bytes", _I64),
        ("values_offset_bytes", _I64),
        ("capacity", _I64),
        ("kv_dtype", _I32),
        ("scale", _F32),
        ("window", _I64),
        ("sinks", _PTR),
        ("out", _PTR),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("value_dim", _I64),
        ("ring", _I64),
    )


class LatentArgs(ctypes.Structure):
    """``krasis_latent_args``."""

    _fields_ = (
        ("q", _PTR),
        ("kv", _PTR),
        ("ldq", _I64),
        ("ldkv", _I64),
        ("tokens", _I64),
        ("num_heads", _I64),
        ("nope_dim", _I64),
        ("rope_dim", _I64),
        ("kv_rank", _I64),
        ("norm", _PTR),
        ("eps", _F32),
        ("rope_style", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("rotary_dims", _I64),
        ("temperature_scale", _F32),
        ("temperature_shift", _I32),
        ("temperature_period", _I64),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("keys_offset_bytes", _I64),
        ("values_offset_bytes", _I64),
        ("capacity", _I64),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("acts", _PTR),
        ("queries", _PTR),
    )


class IndexArgs(ctypes.Structure):
    """``krasis_index_args``."""

    _fields_ = (
        ("k", _PTR),
        ("q", _PTR),
        ("tokens", _I64),
        ("heads", _I64),
        ("dim", _I64),
        ("norm", _PTR),
        ("bias", _PTR),
        ("eps", _F32),
        ("rope_style", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("rotary_dims", _I64),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("keys_offset_bytes", _I64),
        ("values_offset_bytes", _I64),
        ("capacity", _I64),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("gates", _PTR),
        ("positions", _PTR),
        ("block", _I64),
    )


class ChooseArgs(ctypes.Structure):
    """``krasis_choose_args``."""

    _fields_ = (
        ("q", _PTR),
        ("weights", _PTR),
        ("tokens", _I64),
        ("heads", _I64),
        ("dim", _I64),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("keys_offset_bytes", _I64),
        ("values_offset_bytes", _I64),
        ("capacity", _I64),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("chosen", _PTR),
        ("budget", _I64),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("block", _I64),
    )


class RouteArgs(ctypes.Structure):
    """``krasis_route_args``."""

    _fields_ = (
        ("logits", _PTR),
        ("tokens", _I64),
        ("num_experts", _I64),
        ("top_k", _I64),
        ("score", _I32),
        ("renormalise", _I32),
        ("groups", _I64),
        ("top_groups", _I64),
        ("group_score", _I32),
        ("logit_cap", _F32),
        ("bias", _PTR),
        ("correction_bias", _PTR),
        ("expert_scale", _PTR),
        ("sum_floor", _F32),
        ("sum_epsilon", _F32),
        ("scale", _F32),
        ("reserved", _I32),
        ("ids", _PTR),
        ("weights", _PTR),
    )


class ActivationArgs(ctypes.Structure):
    """``krasis_activation_args``."""

    _fields_ = (
        ("x", _PTR),
        ("tokens", _I64),
        ("intermediate", _I64),
        ("kind", _I32),
        ("limit", _F32),
        ("alpha", _F32),
        ("reserved", _I32),
        ("out", _PTR),
        ("acts", _PTR),
    )


class AddRowsArgs(ctypes.Structure):
    """``krasis_add_rows_args``."""

    _fields_ = (
        ("out", _PTR),
        ("tokens", _I64),
        ("k", _I64),
        ("bias", _PTR),
        ("x", _PTR),
        ("logits", _PTR),
        ("scale", _F32),
        ("reserved", _I32),
    )


class MoeArgs(ctypes.Structure):
    """``krasis_moe_args``."""

    _fields_ = (
        ("blob", _PTR),
        ("expert_stride_bytes", _I64),
        ("tiles", _I32),
        ("activation", _I32),
        ("num_experts", _I64),
        ("hidden", _I64),
        ("intermediate", _I64),
        ("top_k", _I64),
        ("acts", _PTR),
        ("ids", _PTR),
        ("weights", _PTR),
        ("out", _PTR),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("executed", _PTR),
        ("limit", _F32),
        ("alpha", _F32),
        ("gate_bias", _PTR),
        ("up_bias", _PTR),
        ("down_bias", _PTR),
    )


class GatedDeltaArgs(ctypes.Structure):
    """``krasis_gated_delta_args``."""

    _fields_ = (
        ("x", _PTR),
        ("ldx", _I64),
        ("tokens", _I64),
        ("key_heads", _I64),
        ("value_heads", _I64),
        ("key_dim", _I64),
        ("value_dim", _I64),
        ("conv_width", _I64),
        ("gates", _PTR),
        ("conv", _PTR),
        ("rates", _PTR),
        ("dt_bias", _PTR),
        ("gate_norm", _PTR),
        ("eps", _F32),
        ("gate", _I32),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("matrices_offset_bytes", _I64),
        ("columns_offset_bytes", _I64),
        ("out", _PTR),
        ("decays", _PTR),
        ("z", _PTR),
        ("lower_bound", _F32),
        ("reserved", _I32),
    )


class ShortConvArgs(ctypes.Structure):
    """``krasis_short_conv_args``."""

    _fields_ = (
        ("x", _PTR),
        ("ldx", _I64),
        ("tokens", _I64),
        ("channels", _I64),
        ("width", _I64),
        ("conv", _PTR),
        ("spans", _PTR),
        ("num_spans", _I64),
        ("columns_offset_bytes", _I64),
        ("out", _PTR),
    )


class NumaCpu(ctypes.Structure):
    """``krasis_numa_cpu``: a CPU, its node counted from 0, and the kernel's number of that node."""

    _fields_ = (("cpu", _I32), ("node", _I32), ("id", _I32))


# name: (result, arguments). The first argument of every function with a pool is the pool.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "krasis_map_file": (_I32, (_I32, _I64, _I64, ctypes.POINTER(_PTR))),
    "krasis_unmap_file": (_I32, (_PTR, _I64)),
    "krasis_prefault": (_I32, (_PTR, _I64)),
    "krasis_collapse": (_I32, (_PTR, _I64, ctypes.POINTER(_I32))),
    "krasis_numa_cpus": (_I32, (_I64, ctypes.POINTER(NumaCpu), ctypes.POINTER(_I64))),
    "krasis_numa_first_unit": (_I64, (_I64, _I64, _I64)),
    "krasis_numa_page_nodes": (_I32, (_PTR, _I64, _PTR)),
    "krasis_numa_read_exactly": (_I32, (_PTR, _I64, _I32)),
    "krasis_read_bandwidth": (_I32, (_PTR, _PTR, _I64, ctypes.POINTER(ctypes.c_double))),
    "krasis_quantize_acts": (_I32, (_PTR, _PTR, _I64, _PTR)),
    "krasis_rms_norm": (_I32, (_PTR, _PTR, _I64, _I64, _PTR, _F32, _PTR, _PTR)),
    "krasis_gemm_int8_rows": (_I32, (_PTR, _PTR, _PTR, _PTR, _I64, _PTR, _I64, _I32)),
    "krasis_gemm_float": (_I32, (_PTR, _PTR, _I64, _I64, _PTR, _I32, _I64, _PTR)),
    "krasis_route": (_I32, (_PTR, _PTR)),
    "krasis_gated_activation": (_I32, (_PTR, _PTR)),
    "krasis_add_rows": (_I32, (_PTR, _PTR)),
    "krasis_moe_workspace_bytes": (_I64, (_I64, _I64, _I64, _I64, _I64)),
    "krasis_moe": (_I32, (_PTR, _PTR)),
    "krasis_qk_norm_rope_store": (_I32, (_PTR, _PTR)),
    "krasis_attention_workspace_bytes": (_I64, (_I64, _I64, _I64, _I64)),
    "krasis_attention": (_I32, (_PTR, _PTR)),
    "krasis_latent_store": (_I32, (_PTR, _PTR)),
    "krasis_index_store": (_I32, (_PTR, _PTR)),
    "krasis_choose": (_I32, (_PTR, _PTR)),
    "krasis_attention_chosen": (_I32, (_PTR, _PTR, _PTR, _I64, _I64)),
    "krasis_gemm_int8_heads": (_I32, (_PTR, _PTR, _PTR, _PTR, _I64, _I64, _PTR, _I64, _I64)),
    "krasis_gated_delta": (_I32, (_PTR, _PTR)),
    "krasis_short_conv": (_I32, (_PTR, _PTR)),
    "krasis_mamba2": (_I32, (_PTR, _PTR)),
    "krasis_gate_rows": (_I32, (_PTR, _PTR, _PTR, _I64, _I64, _I32)),
    "krasis_stream_norm": (_I32, (_PTR, _PTR, _I64, _I64, _I64, _PTR, _F32, _PTR)),
    "krasis_stream_squash": (_I32, (_PTR, _PTR, _I64, _I64, _F32)),
    "krasis_stream_mix": (_I32, (_PTR, _PTR, _PTR, _I64, _I64, _I64, _PTR)),
    "krasis_stream_add": (_I32, (_PTR, _PTR, _PTR, _PTR, _I64, _I64, _I64)),
    "krasis_hyper_weights": (
        _I32,
        (_PTR, _PTR, _I64, _I64, _I64, _F32, _PTR, _I64, _PTR, _PTR, _F32, _I64),
    ),
    "krasis_hyper_sum": (_I32, (_PTR, _PTR, _I64, _I64, _I64, _PTR, _I64, _PTR)),
    "krasis_hyper_add": (_I32, (_PTR, _PTR, _PTR, _PTR, _I64, _I64, _I64)),
    "krasis_wait_flag": (_I32, (_PTR, ctypes.c_uint64, _I64)),
    "krasis_store_flag": (_I32, (_PTR, ctypes.c_uint64)),
}


@functools.cache
def prototype(name: str) -> Callable[..., int]:
    """The function of that name. Raises NativeError if the library lacks it or it is not in the table."""
    try:
        result, arguments = _PROTOTYPES[name]
        function = getattr(library(), name)
    except (KeyError, AttributeError) as error:
        raise NativeError("the native library has no such function", where=name, hint="rebuild it") from error
    function.restype = result
    function.argtypes = list(arguments)
    return function  # type: ignore[no-any-return]
