"""Which model families run, and on what. A new family or machine is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from krasis.formats.bundle_reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime.model.backend import Backend
from krasis.runtime.model.weights import ModelWeights, load_weights
from krasis.runtime.settings import EngineSettings

BackendFactory = Callable[[ModelWeights, EngineSettings], Backend]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How one ``model_type`` is run: by activations setting, the backend's factory."""

    model_type: str
    backends: dict[str, BackendFactory]


def _cpu(weights: ModelWeights, settings: EngineSettings) -> Backend:
    from krasis.runtime.model.cpu_backend import CpuBackend

    return CpuBackend(weights, settings)


def _reference(weights: ModelWeights, settings: EngineSettings) -> Backend:
    from krasis.runtime.model.float_backend import FloatBackend

    return FloatBackend(weights, settings)


FAMILIES = {
    family.model_type: family for family in (ModelFamily("qwen3_moe", {"int8": _cpu, "float32": _reference}),)
}


def open_backend(bundle: Bundle, settings: EngineSettings) -> Backend:
    """The backend for a bundle. Raises UnsupportedModelError for a family that none is registered for."""
    model_type = bundle.architecture.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            "no runtime for this model family",
            where=str(bundle.path),
            got=model_type,
            limit=", ".join(FAMILIES),
        )
    weights = load_weights(bundle, settings.experts)
    return FAMILIES[model_type].backends[settings.activations](weights, settings)
