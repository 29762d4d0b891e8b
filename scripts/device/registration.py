"""Which kinds of host memory this machine's driver pins, and how fast copies from them are."""

from __future__ import annotations

from typing import Any

from scripts.device import places
from scripts.device.context import Context
from scripts.device.devices import open_device


def run(context: Context) -> dict[str, Any]:
    """One record a kind and place that was tried."""
    from krasis.runtime.host_memory import survey, survey_to_text

    device = open_device(context)
    try:
        folders = [places.ram_folder(context), places.disk_folder(context)]
        trials = survey(device, folders, context.sizes.survey_bytes)
    finally:
        device.close()
    print(survey_to_text(trials))
    return {"trials": [trial.to_json() for trial in trials]}
