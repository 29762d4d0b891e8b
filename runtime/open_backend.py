"""Which backend runs a bundle, by the settings and by what the model needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.backend import Backend
from krasis.runtime.context_size import tokens_in_ram
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from krasis.runtime.draft_option import not_on_gpus, num_drafts
from krasis.runtime.host import visible_gpus
from krasis.runtime.missing_kernels import (
    GPU_RUNS,
    lacking,
    refuse_long_blocks,
    refuse_missing_kernels,
)
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)


def open_backend(bundle: Bundle, settings: EngineSettings) -> Backend:
    """The backend for a bundle, on the device that the settings name.

    Raises UnsupportedModelError for a model that needs what the backend has no kernels for; with a device
    that is insisted on, what ``open_gpu_backend`` raises.
    """
    where = str(bundle.path)
    refuse_missing_kernels(bundle.spec, where)
    refuse_long_blocks(bundle.spec, settings.context)
    on_gpu = _on_gpu(bundle, settings)
    if on_gpu is not None:
        if settings.draft:
            on_gpu.close()
            raise not_on_gpus()
        return on_gpu
    drafts = num_drafts(bundle, settings)
    weights = load_weights(bundle, settings.experts, draft=drafts > 0)
    settings = replace(settings, draft=drafts)
    if settings.context is None:
        tiers = ("dense", settings.experts)
        fitting = tokens_in_ram(bundle, tiers, settings.kv_dtype, drafts=drafts > 0)
        settings = replace(settings, context=settings.context_for(bundle.spec.max_context, fitting))
    return _cpu_backend(settings.activations)(weights, settings)


def _cpu_backend(activations: str) -> Callable[[ModelWeights, EngineSettings], Backend]:
    if activations == "float32":
        from krasis.runtime.cpu.float_backend import FloatBackend

        return FloatBackend
    from krasis.runtime.cpu.backend import CpuBackend

    return CpuBackend


def _on_gpu(bundle: Bundle, settings: EngineSettings) -> Backend | None:
    """The GPU's backend; None where settings, machine or model leave it to the CPU."""
    missing = lacking(bundle.spec, GPU_RUNS)
    if missing and settings.device in ("cuda", "double"):
        refuse_missing_kernels(bundle.spec, str(bundle.path), GPU_RUNS)
    if missing:
        logger.info("on the CPU: the GPU has no kernels yet for %s", missing[0])
        return None
    if settings.device == "cpu":
        return None
    is_for_gpu = settings.activations == "int8" and "gpu" in bundle.manifest.layouts
    if settings.device == "auto" and is_for_gpu and not visible_gpus.driver_loaded():
        # To look for more that is in the way takes 25 ms of imports, the planner's modules among them.
        logger.info("running on the CPU: there is no GPU: no NVIDIA driver is loaded")
        return None
    from krasis.runtime.gpu.opening import open_gpu_backend

    return open_gpu_backend(bundle, settings)
