"""Which device a rank opens, and the backend on it."""

from __future__ import annotations

import torch

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.device.api import Device
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.settings import EngineSettings


def check_settings(bundle: Bundle, settings: EngineSettings) -> None:
    """What can be known before any process is started. Raises UsageError for settings that leave no room for
    GPUs, and what ``gpu.opening.refuse`` raises for a bundle or machine that does not run on them."""
    from krasis.runtime.gpu.opening import refuse

    if settings.device == "cpu":
        raise UsageError("--gpus needs GPUs", got="--device cpu", hint="leave out --device")
    refuse(bundle, settings)


def check_gpu_count(settings: EngineSettings, num_gpus: int) -> None:
    """Raises ResourceError if this machine has fewer."""
    if settings.device == "double":
        return
    found = torch.cuda.device_count()
    if num_gpus > found:
        raise ResourceError("this machine has fewer GPUs", got=num_gpus, limit=found, hint="a smaller --gpus")


def open_rank_device(settings: EngineSettings, place: Place) -> Device:
    """The GPU of a rank's number on its host, or a double of one."""
    from krasis.runtime.gpu.opening import open_device

    check_gpu_count(settings, place.num_local_ranks)
    if settings.device == "double":
        torch.set_num_threads(1)  # ranks share the host's cores
    return open_device(settings, place.local_rank, place.num_ranks)


def open_rank_backend(
    bundle: Bundle, settings: EngineSettings, device: Device, parallel: Parallel
) -> RankedBackend:
    """The GPU backend of one rank."""
    from krasis.runtime.gpu.backend import GpuBackend

    return GpuBackend(bundle, settings, device, parallel)
