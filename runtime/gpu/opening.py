"""Whether a bundle runs on a GPU here, and the backend if so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import (
    KrasisError,
    MismatchError,
    NativeError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from krasis.formats.layouts import expert_format
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, ShortConv
from krasis.formats.models.spec import ModelSpec
from krasis.formats.process.stages import stage
from krasis.runtime.backend import Backend
from krasis.runtime.device.driver import make_context
from krasis.runtime.device.library import find_cuda_library
from krasis.runtime.early import Early
from krasis.runtime.host import environment
from krasis.runtime.host.visible_gpus import VARIABLE, gpus_hidden, has_gpu
from krasis.runtime.missing_kernels import GPU_RUNS, refuse_missing_kernels
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.settings import EngineSettings

if TYPE_CHECKING:
    from krasis.runtime.device.api import Device

logger = logging.getLogger(__name__)

# Of a sound bundle: a damaged one is not to be run anywhere.
_IN_THE_WAY = (MismatchError, NativeError, ResourceError, UnsupportedModelError, UsageError)
MAX_EXPERTS, MAX_TOP_K = 1024, 64  # of the routing kernel
MAX_LATENT, MAX_SHARED_KEY = 512, 64  # channels, of the kernel of latent attention
DOUBLE_BYTES = 2**30
"""VRAM of the double unless the settings say."""


def open_gpu_backend(bundle: Bundle, settings: EngineSettings) -> Backend | None:
    """The GPU backend that the settings ask for; None if they leave it open and the CPU must do (the log says
    why).

    Raises what is in the way if the settings insist (``cuda``, ``double``): UsageError for settings that
    contradict it, MismatchError without GPU experts, NativeError without the library, ResourceError without a
    GPU or room.
    """
    if settings.device == "cpu":
        return None
    insists = settings.device != "auto"
    try:
        refuse(bundle, settings)
        return _open(bundle, settings)
    except _IN_THE_WAY as error:
        if insists:
            raise
        # An idle GPU that a better installation, or another option, would use is worth a line; what the user
        # chose is not.
        broken = has_gpu() and (isinstance(error, NativeError) or error.where.startswith("torch "))
        words = (
            "this machine's GPU is not used, everything runs on the CPU" if broken else "running on the CPU"
        )
        logger.log(logging.WARNING if broken else logging.INFO, "%s: %s", words, error)
        return None


def refuse(bundle: Bundle, settings: EngineSettings) -> None:
    """Raises what is in the way, as far as it can be known before torch is imported."""
    if settings.activations != "int8":
        raise UsageError(
            f"activations in {settings.activations} are a reference that runs on the CPU",
            hint='leave activations at "int8", or use device="cpu"',
        )
    if "gpu" not in bundle.manifest.layouts:
        raise MismatchError(
            "the bundle has no gpu experts",
            where=str(bundle.path),
            got=", ".join(sorted(bundle.manifest.layouts)),
            hint="convert again without leaving that tier out",
        )
    _check_kernels(bundle)
    if settings.device != "double" and not environment.nvidia_driver_loaded():
        raise ResourceError("there is no GPU: no NVIDIA driver is loaded")
    if settings.device != "double" and (hidden := gpus_hidden()):
        raise ResourceError(f"there is no GPU: {hidden}", hint=f"unset {VARIABLE}, or use --device cpu")


def _check_kernels(bundle: Bundle) -> None:
    """Raises UnsupportedModelError for what no kernel of ``csrc/krasis_cuda.h`` takes."""
    spec, where = bundle.spec, str(bundle.path)
    refuse_missing_kernels(spec, where, GPU_RUNS)
    shape = shape_of(spec)
    layout = expert_format(bundle.manifest.layouts["gpu"], where=where)
    if "gpu" not in layout.backends:
        raise UnsupportedModelError(
            "the GPU kernels run 4-bit Marlin experts only",
            where=where,
            got=layout.layout_id,
            hint="convert with 4 bits for the GPU experts",
        )
    for name, size, limit in (
        ("experts", shape.num_experts, MAX_EXPERTS),
        ("experts a token", shape.num_experts_per_token, MAX_TOP_K),
        *_latent_limits(spec),
    ):
        if size > limit:
            raise UnsupportedModelError(f"too many {name} for the GPU", where=where, got=size, limit=limit)
    for name, size, multiple in _granular_sizes(spec):
        if size % multiple:
            raise UnsupportedModelError(
                f"the GPU kernels do not take this {name}",
                where=where,
                got=size,
                limit=f"multiples of {multiple}",
            )


def _granular_sizes(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """(name, size, what it must be a multiple of)."""
    yield "hidden size", spec.hidden, 64
    yield "rank of the residual streams' gates", 0 if spec.residual is None else spec.residual.rank, 64
    yield "size of rows of hashed tables", 0 if spec.ngram is None else spec.ngram.dim, 64
    for layer in dict.fromkeys(spec.layers):
        if isinstance(layer.mixer, Attention):
            yield "attention size", layer.mixer.query_rows, 64
            yield "head size", layer.mixer.head_dim, 16
            parts = 1 if layer.mixer.shared_kv else 2
            yield "size of q, k and v", layer.mixer.query_rows + parts * layer.mixer.key_rows, 32
        if isinstance(layer.mixer, ShortConv):
            yield "size of short convolutions", layer.mixer.channels, 64
        if isinstance(layer.mixer, ChannelDelta):
            yield "rank of linear attention's gates", layer.mixer.decay_rank or 0, 64
            yield "rank of linear attention's gates", layer.mixer.gate_rank or 0, 64
        if isinstance(layer.mixer, GatedDelta | ChannelDelta):
            values = layer.mixer.value_heads * layer.mixer.value_dim
            yield "size of linear attention", values, 64
            yield "size of linear attention's q, k and v", layer.mixer.conv_channels, 32
        if isinstance(layer.mixer, LatentAttention):
            yield from _latent_sizes(layer.mixer)
        mlp = layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp
        if isinstance(mlp, MlpBesideExperts):
            mlp = mlp.mlp
        if isinstance(mlp, GatedMlp):
            yield "MLP's width", mlp.intermediate, 64


def _latent_limits(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    for layer in dict.fromkeys(spec.layers):
        if isinstance(layer.mixer, LatentAttention):
            yield "channels of latents", layer.mixer.kv_rank, MAX_LATENT
            yield "rotated channels beside latents", layer.mixer.rope_dim, MAX_SHARED_KEY


def _latent_sizes(mixer: LatentAttention) -> Iterator[tuple[str, int, int]]:
    yield "size of latents", mixer.kv_rank, 64
    yield "size of the queries' latents", mixer.q_rank or 0, 64
    yield "size of latents and shared keys", mixer.kv_rank + mixer.rope_dim, 32
    yield "head size", mixer.nope_dim, 64
    yield "value size", mixer.value_dim, 32
    yield "attention size", mixer.heads * mixer.value_dim, 64


def _open(bundle: Bundle, settings: EngineSettings) -> Backend:
    begun = begin_context(settings)
    with stage("import torch and what runs on GPUs"):
        from krasis.runtime.gpu.backend import GpuBackend

    with stage("open the device"):
        begun.result()
        device = open_device(settings)
    try:
        return GpuBackend(bundle, settings, device, closes_device=True)
    except BaseException:
        _close_quietly(device)
        raise


def begin_context(settings: EngineSettings, index: int = 0) -> Early[bool]:
    """Begins to make the context of this process's GPU number index, in the background. Nothing for a double,
    nor without the library, which ``open_device`` will miss."""
    if settings.device == "double" or not _has_library():
        return Early(lambda: False)
    return Early(lambda: make_context(index))


def _has_library() -> bool:
    try:
        find_cuda_library()
    except NativeError:
        return False
    return True


def open_device(settings: EngineSettings, index: int = 0, num_ranks: int = 1) -> Device:
    """GPU number index of this process, or a double. num_ranks: that will exchange data. Raises NativeError
    without the library, ResourceError without such a GPU.
    """
    if settings.device == "double":
        from krasis.runtime.device.double import DeviceDouble

        return DeviceDouble(seed=index, total_bytes=settings.vram_bytes or DOUBLE_BYTES)
    find_cuda_library()  # before torch's part of CUDA
    from krasis.runtime.device.cuda import CudaDevice

    return CudaDevice(index, settings.vram_bytes, outside_bytes(num_ranks))


def outside_bytes(num_ranks: int) -> int:
    """VRAM that a process takes beside what is allocated for the model."""
    # The planner's modules take 50 ms to import: a start on the CPU passes here, and does without.
    from krasis.runtime.planning import assumptions as assumed

    return assumed.GPU_CONTEXT_BYTES + (assumed.NCCL_BYTES if num_ranks > 1 else 0)


def _close_quietly(device: Device) -> None:
    """After an error that is being raised: a second one would hide it."""
    try:
        device.close()
    except (KrasisError, RuntimeError) as error:
        logger.warning("the device could not be closed: %s", error)
