"""The device a stage runs on, and engines on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krasis.runtime import Engine, EngineSettings
from krasis.runtime.device.api import Device
from scripts.device.context import Context


def open_device(context: Context) -> Device:
    """The first GPU, or the double."""
    if context.is_cuda:
        from krasis.runtime.device.cuda import CudaDevice

        return CudaDevice(0)
    from krasis.runtime.device.double import DeviceDouble

    return DeviceDouble()


def open_engine(context: Context, bundle: Path, num_positions: int, **changes: Any) -> Engine:
    """A bundle on the context's device."""
    settings = EngineSettings(
        **{"context": num_positions, "device": context.device, "prefault": False, **changes}
    )
    return Engine.open(bundle, settings)


def facts_of(engine: Engine) -> dict[str, Any]:
    """What the engine says of itself."""
    parts = getattr(engine._backend, "_parts", None)
    store = getattr(parts, "store", None)
    found: dict[str, Any] = {
        "description": engine.description,
        "prefilled_on": engine.placement[0],
        "decoded_on": engine.placement[1],
    }
    if store is not None:
        found["store"] = store.choice.to_json()
    return found
