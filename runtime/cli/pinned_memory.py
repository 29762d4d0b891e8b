"""The part of ``krasis-info --env`` on pinned host memory: what the driver pins, how fast the link is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import KrasisError
from krasis.runtime.host.environment import Environment

if TYPE_CHECKING:
    from krasis.runtime.host.measure_gpu import GpuRates

SURVEY_BYTES = 64 * 2**20
_TITLE = "Pinned host memory"


def pinned_memory_report(found: Environment) -> tuple[dict[str, Any], str]:
    """(JSON, text): every kind of memory tried on GPU 0, or one sentence why nothing could be tried."""
    problem = _why_not(found)
    if problem:
        return {"problem": problem}, f"{_TITLE}\n  not tried: {problem}"
    import torch

    from krasis.formats.units import format_bytes
    from krasis.runtime.host.measure_gpu import measure_gpu
    from krasis.runtime.host_memory.survey import survey_to_text, survey_with
    from krasis.runtime.host_memory.this_driver import driver_registrar

    try:
        trials = survey_with(driver_registrar(0), torch.device("cuda", 0), num_bytes=SURVEY_BYTES)
    except KrasisError as error:
        return {"problem": str(error)}, f"{_TITLE}\n  not tried: {error}"
    record: dict[str, Any] = {"problem": "", "trials": [trial.to_json() for trial in trials], "rates": None}
    try:
        rates = measure_gpu(0)
        record["rates"], last = asdict(rates), _rates_line(rates)
    except KrasisError as error:
        record["problem"], last = str(error), f"  {error}"
    table = "\n".join("  " + line for line in survey_to_text(trials).splitlines())
    size = format_bytes(SURVEY_BYTES)
    return record, f"{_TITLE} (cudaHostRegister of {size} each, on GPU 0)\n{table}\n{last}"


def _rates_line(rates: GpuRates) -> str:
    return (
        f"  GPU 0: {rates.h2d_gbps:.1f} GB/s from pinned memory, {rates.d2h_gbps:.1f} GB/s to it, VRAM "
        f"{rates.memory_gbps:.0f} GB/s, bf16 {rates.bf16_tflops:.1f} TFLOP/s"
    )


def _why_not(found: Environment) -> str:
    if found.libraries.cuda_problem:
        return found.libraries.cuda_problem
    if found.torch is None:
        return "torch was not asked for"
    if found.torch.problem:
        return found.torch.problem
    return "" if found.torch.devices else "torch finds no CUDA device"
