"""One checked Python call per function of ``csrc/krasis_cuda.h``."""

from __future__ import annotations

from krasis.runtime.gpu.kernels.attention_rows import AttentionKernels
from krasis.runtime.gpu.kernels.decode import DecodeKernels
from krasis.runtime.gpu.kernels.dense import DenseKernels
from krasis.runtime.gpu.kernels.fused import FusedKernels
from krasis.runtime.gpu.kernels.gated_delta import DeltaKernels
from krasis.runtime.gpu.kernels.index import IndexKernels
from krasis.runtime.gpu.kernels.latent import LatentKernels
from krasis.runtime.gpu.kernels.mamba import MambaKernels
from krasis.runtime.gpu.kernels.mlp import MlpKernels
from krasis.runtime.gpu.kernels.moe import MoeKernels
from krasis.runtime.gpu.kernels.move_positions import MoveKernels
from krasis.runtime.gpu.kernels.rank_rows import RankKernels
from krasis.runtime.gpu.kernels.routing import ExpertMatrix, Routing
from krasis.runtime.gpu.kernels.short_conv import ConvKernels
from krasis.runtime.gpu.kernels.streams import StreamKernels

__all__ = ["ExpertMatrix", "GpuKernels", "Routing"]


class GpuKernels(
    DenseKernels,
    AttentionKernels,
    DeltaKernels,
    ConvKernels,
    MambaKernels,
    LatentKernels,
    IndexKernels,
    MlpKernels,
    MoeKernels,
    DecodeKernels,
    FusedKernels,
    RankKernels,
    MoveKernels,
    StreamKernels,
):
    """The kernels of a device's library.

    Each checks shapes and types, names the memory it touches and submits one launch. Wrong arguments raise
    NativeError when a call is made; what only the native code finds, when it runs: at once on CUDA, later on
    the double. Arguments live until then.
    """
