"""Which model families run, and on what. A new family or machine is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime.backend import Backend
from krasis.runtime.context_size import tokens_in_ram
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from krasis.runtime.settings import EngineSettings

BackendFactory = Callable[[ModelWeights, EngineSettings], Backend]
GpuFactory = Callable[[Bundle, EngineSettings], Backend | None]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How one ``model_type`` is run. backends: of the CPU, by activations setting. gpu: tried first, None
    where the settings or the machine leave it to the CPU.
    """

    model_type: str
    backends: dict[str, BackendFactory]
    gpu: GpuFactory


def _cpu(weights: ModelWeights, settings: EngineSettings) -> Backend:
    from krasis.runtime.cpu.backend import CpuBackend

    return CpuBackend(weights, settings)


def _reference(weights: ModelWeights, settings: EngineSettings) -> Backend:
    from krasis.runtime.cpu.float_backend import FloatBackend

    return FloatBackend(weights, settings)


def _gpu(bundle: Bundle, settings: EngineSettings) -> Backend | None:
    from krasis.runtime.gpu.opening import open_gpu_backend

    return open_gpu_backend(bundle, settings)


FAMILIES = {
    family.model_type: family
    for family in (ModelFamily("qwen3_moe", {"int8": _cpu, "float32": _reference}, _gpu),)
}


def open_backend(bundle: Bundle, settings: EngineSettings) -> Backend:
    """The backend for a bundle, on the device that the settings name.

    Raises UnsupportedModelError for a family that none is registered for; with a device that is insisted on,
    what ``open_gpu_backend`` raises.
    """
    model_type = bundle.architecture.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            "no runtime for this model family",
            where=str(bundle.path),
            got=model_type,
            limit=", ".join(FAMILIES),
        )
    family = FAMILIES[model_type]
    on_gpu = family.gpu(bundle, settings)
    if on_gpu is not None:
        return on_gpu
    weights = load_weights(bundle, settings.experts)
    if settings.context is None:
        fitting = tokens_in_ram(bundle, ("dense", settings.experts), settings.kv_dtype)
        settings = replace(settings, context=settings.context_for(bundle.architecture.max_context, fitting))
    return family.backends[settings.activations](weights, settings)
