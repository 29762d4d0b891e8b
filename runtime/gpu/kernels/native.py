"""ctypes prototypes of ``csrc/krasis_cuda.h`` and its structures; nothing here checks tensors.

``cuda_prototype(library, name)`` gives a function with its argument types set; a function that the library
lacks is an error only when asked for. Pointers are plain integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.kernels.native_conv import Mamba2Args as Mamba2Args
from krasis.runtime.gpu.kernels.native_conv import ShortConvArgs as ShortConvArgs
from krasis.runtime.gpu.kernels.native_fused import NormInt8Args as NormInt8Args
from krasis.runtime.gpu.kernels.native_fused import NormRouteArgs as NormRouteArgs
from krasis.runtime.gpu.kernels.native_index import ChooseArgs as ChooseArgs
from krasis.runtime.gpu.kernels.native_index import IndexArgs as IndexArgs
from krasis.runtime.gpu.kernels.native_latent import Int8HeadsArgs as Int8HeadsArgs
from krasis.runtime.gpu.kernels.native_latent import LatentArgs as LatentArgs
from krasis.runtime.gpu.kernels.native_latent import LatentAttentionArgs as LatentAttentionArgs
from krasis.runtime.gpu.kernels.native_move import MoveArgs as MoveArgs
from krasis.runtime.gpu.kernels.native_ranks import TakeArgs as TakeArgs
from krasis.runtime.gpu.kernels.native_route import RouteArgs as RouteArgs
from krasis.runtime.gpu.kernels.native_streams import STREAM_PROTOTYPES
from krasis.runtime.gpu.kernels.native_streams import StreamAddArgs as StreamAddArgs
from krasis.runtime.gpu.kernels.native_streams import StreamMixArgs as StreamMixArgs
from krasis.runtime.gpu.kernels.native_streams import StreamNormArgs as StreamNormArgs
from krasis.runtime.gpu.kernels.native_streams import StreamSquashArgs as StreamSquashArgs
from krasis.runtime.gpu.kernels.native_streams import TableAddArgs as TableAddArgs
from krasis.runtime.gpu.kernels.native_streams import TableWeighArgs as TableWeighArgs

_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_U64 = ctypes.c_uint64
SEND_PIECES = 4


class AlignArgs(ctypes.Structure):
    """``krasis_cuda_align_args``."""

    _fields_ = (
        ("ids", _PTR),
        ("num_slots", _I64),
        ("num_experts", _I32),
        ("m_block", _I32),
        ("sorted_slots", _PTR),
        ("block_experts", _PTR),
        ("first_block", _PTR),
        ("counts", _PTR),
        ("num_invalid", _PTR),
    )


class MoeGemmArgs(ctypes.Structure):
    """``krasis_cuda_moe_gemm_args``."""

    _fields_ = (
        ("activations", _PTR),
        ("activation_stride", _I64),
        ("slots_per_row", _I64),
        ("dtype", _I32),
        ("gated", _I32),
        ("expert_base", _PTR),
        ("codes_offset", _I64),
        ("scales_offset", _I64),
        ("scale_dtype", _I32),
        ("m_block", _I32),
        ("group", _I64),
        ("k", _I64),
        ("n", _I64),
        ("num_slots", _I64),
        ("num_experts", _I32),
        ("expert_begin", _I32),
        ("expert_end", _I32),
        ("max_blocks_launched", _I32),
        ("sorted_slots", _PTR),
        ("block_experts", _PTR),
        ("first_block", _PTR),
        ("out", _PTR),
        ("out_stride", _I64),
        ("out_dtype", _I32),
        ("reserved", _I32),
        ("num_executed", _PTR),
        ("bias", _PTR),
        ("up_bias", _PTR),
        ("activation", _I32),
        ("limit", _F32),
        ("alpha", _F32),
        ("ids", _PTR),
        ("slot_weights", _PTR),
        ("hidden", _PTR),
        ("arrivals", _PTR),
        ("top_k", _I64),
    )


class MoeReduceArgs(ctypes.Structure):
    """``krasis_cuda_moe_reduce_args``."""

    _fields_ = (
        ("slots", _PTR),
        ("slots_dtype", _I32),
        ("out_dtype", _I32),
        ("ids", _PTR),
        ("weights", _PTR),
        ("residual", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("top_k", _I64),
        ("n", _I64),
        ("num_experts", _I32),
        ("reserved", _I32),
    )


class Int8GemmArgs(ctypes.Structure):
    """``krasis_cuda_int8_gemm_args``."""

    _fields_ = (
        ("x", _PTR),
        ("x_stride", _I64),
        ("tokens", _I64),
        ("k", _I64),
        ("n", _I64),
        ("dtype", _I32),
        ("out_dtype", _I32),
        ("weight", _PTR),
        ("scales", _PTR),
        ("residual", _PTR),
        ("out", _PTR),
        ("out_stride", _I64),
    )


class RmsNormArgs(ctypes.Structure):
    """``krasis_cuda_rms_norm_args``."""

    _fields_ = (
        ("x", _PTR),
        ("weight", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("k", _I64),
        ("x_dtype", _I32),
        ("weight_dtype", _I32),
        ("out_dtype", _I32),
        ("eps", _F32),
    )


class QkvArgs(ctypes.Structure):
    """``krasis_cuda_qkv_args``."""

    _fields_ = (
        ("qkv", _PTR),
        ("tokens", _I64),
        ("start", _I64),
        ("num_heads", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("q_norm", _PTR),
        ("k_norm", _PTR),
        ("dtype", _I32),
        ("norm_dtype", _I32),
        ("eps", _F32),
        ("norm_kind", _I32),
        ("cos", _PTR),
        ("sin", _PTR),
        ("max_positions", _I64),
        ("k_cache", _PTR),
        ("v_cache", _PTR),
        ("capacity", _I64),
        ("start_device", _PTR),
        ("rows", _PTR),
        ("keys_offset", _I64),
        ("values_offset", _I64),
        ("bias", _PTR),
        ("rotary_dims", _I64),
        ("clip", _F32),
        ("interleaved", _I32),
        ("shared_kv", _I32),
        ("value_norm", _I32),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("ring", _I64),
    )


class ActivationArgs(ctypes.Structure):
    """``krasis_cuda_activation_args``."""

    _fields_ = (
        ("x", _PTR),
        ("x_stride", _I64),
        ("tokens", _I64),
        ("n", _I64),
        ("bias", _PTR),
        ("out", _PTR),
        ("out_stride", _I64),
        ("dtype", _I32),
        ("kind", _I32),
        ("limit", _F32),
        ("alpha", _F32),
    )


class AddRowsArgs(ctypes.Structure):
    """``krasis_cuda_add_rows_args``."""

    _fields_ = (
        ("hidden", _PTR),
        ("x", _PTR),
        ("gates", _PTR),
        ("bias", _PTR),
        ("tokens", _I64),
        ("n", _I64),
        ("x_dtype", _I32),
        ("reserved", _I32),
    )


class RouterArgs(ctypes.Structure):
    """``krasis_cuda_router_args``."""

    _fields_ = (
        ("x", _PTR),
        ("weight", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("k", _I64),
        ("num_experts", _I64),
        ("weight_dtype", _I32),
        ("reserved", _I32),
    )


class AttentionArgs(ctypes.Structure):
    """``krasis_cuda_attention_args``."""

    _fields_ = (
        ("q", _PTR),
        ("k_cache", _PTR),
        ("v_cache", _PTR),
        ("out", _PTR),
        ("position", _PTR),
        ("num_heads", _I64),
        ("num_kv_heads", _I64),
        ("head_dim", _I64),
        ("capacity", _I64),
        ("dtype", _I32),
        ("scale", _F32),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("num_rows", _I64),
        ("rows", _PTR),
        ("keys_offset", _I64),
        ("values_offset", _I64),
        ("q_stride", _I64),
        ("out_stride", _I64),
        ("sinks", _PTR),
        ("window", _I64),
        ("kv_dtype", _I32),
        ("reserved", _I32),
        ("ring", _I64),
    )


class GateRowsArgs(ctypes.Structure):
    """``krasis_cuda_gate_rows_args``."""

    _fields_ = (
        ("x", _PTR),
        ("gates", _PTR),
        ("count", _I64),
        ("dtype", _I32),
        ("reserved", _I32),
    )


class GatedDeltaArgs(ctypes.Structure):
    """``krasis_cuda_gated_delta_args``."""

    _fields_ = (
        ("x", _PTR),
        ("gates", _PTR),
        ("mixed", _PTR),
        ("out", _PTR),
        ("tokens", _I64),
        ("key_heads", _I64),
        ("value_heads", _I64),
        ("key_dim", _I64),
        ("value_dim", _I64),
        ("conv_width", _I64),
        ("conv", _PTR),
        ("a_log", _PTR),
        ("dt_bias", _PTR),
        ("gate_norm", _PTR),
        ("dtype", _I32),
        ("norm_dtype", _I32),
        ("eps", _F32),
        ("gate", _I32),
        ("matrices", _PTR),
        ("columns", _PTR),
        ("start", _I64),
        ("rows", _PTR),
        ("matrices_offset", _I64),
        ("columns_offset", _I64),
        ("chunks", _PTR),
        ("num_chunks", _I64),
        ("decays", _PTR),
        ("z", _PTR),
        ("lower_bound", _F32),
        ("reserved", _I32),
    )


class SendArgs(ctypes.Structure):
    """``krasis_cuda_send_args``."""

    _fields_ = (
        ("sources", _PTR * SEND_PIECES),
        ("destinations", _PTR * SEND_PIECES),
        ("num_bytes", _I64 * SEND_PIECES),
        ("flag", _PTR),
        ("epoch", _PTR),
    )


class ReceiveArgs(ctypes.Structure):
    """``krasis_cuda_receive_args``."""

    _fields_ = (
        ("flag", _PTR),
        ("epoch", _PTR),
        ("timeout_ns", _I64),
        ("timeouts", _PTR),
        ("tag", _U64),
        ("hidden", _PTR),
        ("x", _PTR),
        ("count", _I64),
    )


# name without krasis_cuda_: (result, arguments). The last argument of what launches something is the stream.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "moe_m_block": (_I32, (_I64, _I64)),
    "align_max_blocks": (_I64, (_I64, _I64, _I32)),
    "attention_workspace_bytes": (_I64, (_I64, _I64, _I64, _I64)),
    "moe_align": (_I32, (_PTR, _PTR)),
    "moe_gemm": (_I32, (_PTR, _PTR)),
    "moe_reduce": (_I32, (_PTR, _PTR)),
    "int8_gemm": (_I32, (_PTR, _PTR)),
    "rms_norm": (_I32, (_PTR, _PTR)),
    "qk_norm_rope_store": (_I32, (_PTR, _PTR)),
    "gated_activation": (_I32, (_PTR, _PTR)),
    "add_rows": (_I32, (_PTR, _PTR)),
    "gate_rows": (_I32, (_PTR, _PTR)),
    "gated_delta": (_I32, (_PTR, _PTR)),
    "short_conv": (_I32, (_PTR, _PTR)),
    "mamba2": (_I32, (_PTR, _PTR)),
    "router": (_I32, (_PTR, _PTR)),
    **STREAM_PROTOTYPES,
    "route": (_I32, (_PTR, _PTR)),
    "norm_route": (_I32, (_PTR, _PTR)),
    "norm_int8_gemv": (_I32, (_PTR, _PTR)),
    "attention_decode": (_I32, (_PTR, _PTR)),
    "latent_workspace_bytes": (_I64, (_I64, _I64, _I64, _I64)),
    "latent_store": (_I32, (_PTR, _PTR)),
    "int8_heads": (_I32, (_PTR, _PTR)),
    "latent_attention": (_I32, (_PTR, _PTR)),
    "index_store": (_I32, (_PTR, _PTR)),
    "choose": (_I32, (_PTR, _PTR)),
    "advance": (_I32, (_PTR, _PTR)),
    "signal": (_I32, (_PTR, _PTR, _PTR)),
    "wait": (_I32, (_PTR, _PTR, _I64, _PTR, _PTR)),
    "add": (_I32, (_PTR, _PTR, _I64, _PTR)),
    "send": (_I32, (_PTR, _PTR)),
    "receive": (_I32, (_PTR, _PTR)),
    "take": (_I32, (_PTR, _PTR)),
    "move_positions": (_I32, (_PTR, _PTR)),
    "int8_dequant": (_I32, (_PTR, _PTR, _I64, _I64, _I32, _PTR, _PTR)),
}


def cuda_prototype(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    """``krasis_cuda_`` + name. Raises NativeError if the library lacks it or it is not in the table."""
    try:
        result, arguments = PROTOTYPES[name]
        function = getattr(library, f"krasis_cuda_{name}")
    except (KeyError, AttributeError) as error:
        raise NativeError(
            "the native GPU library has no such function", where=f"krasis_cuda_{name}", hint="rebuild it"
        ) from error
    function.restype = result
    function.argtypes = list(arguments)
    return function  # type: ignore[no-any-return]
