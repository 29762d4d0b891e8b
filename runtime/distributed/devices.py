"""Which device a rank opens, and the backend on it."""

from __future__ import annotations

import torch

from krasis.formats.bundle_reader import Bundle
from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.device.api import Device
from krasis.runtime.distributed.parallel import Parallel
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.settings import EngineSettings


def check_local_devices(settings: EngineSettings, num_gpus: int) -> None:
    """Raises UsageError if the settings leave no room for several GPUs, ResourceError if there are fewer."""
    if settings.device == "cpu":
        raise UsageError("--gpus needs a GPU device", got="--device cpu", hint="leave out --device")
    if settings.device == "double":
        return
    found = torch.cuda.device_count()
    if num_gpus > found:
        raise ResourceError("this machine has fewer GPUs", got=num_gpus, limit=found, hint="a smaller --gpus")


def open_device(settings: EngineSettings, place: Place) -> Device:
    """The GPU of a rank's number on its host, or a double of one."""
    if settings.device == "double":
        from krasis.runtime.device.double import DeviceDouble

        torch.set_num_threads(1)  # ranks share the host's cores
        limit = {} if settings.vram_bytes is None else {"total_bytes": settings.vram_bytes}
        return DeviceDouble(seed=place.rank, **limit)
    check_local_devices(settings, place.num_local_ranks)
    from krasis.runtime.device.cuda import CudaDevice

    return CudaDevice(place.local_rank, settings.vram_bytes)


def open_gpu_backend(
    bundle: Bundle, settings: EngineSettings, device: Device, parallel: Parallel
) -> RankedBackend:
    """The GPU backend of one rank."""
    from krasis.runtime.gpu.backend import GpuBackend

    return GpuBackend(bundle, settings, device, parallel)
