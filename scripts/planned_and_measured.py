"""Compares plans with what the lent machines measured, and writes the table into docs/PLANNING.md.

    python -m scripts.planned_and_measured [--check]

The planner's constants were set by docs/measured/reference.h5 (two H200, 32 CPUs), h100.json (one H100, 16
CPUs), rank_decode.json, gpt-oss of h200.json and the start of reference-h200.h5. Nothing was set by the
second table's rows: reference-h200.h5 (one H200, 16 CPUs) and the other families of h200.json. Rates that a
record has are given to the planner, so that what is compared is its arithmetic and its assumptions.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import h5py

from krasis.runtime.planning import Plan, Workload, cost, make_plan, sizes_of_shape
from krasis.runtime.planning.hardware import GIB, GpuSpec, HardwareSpec, describe_host, given
from krasis.runtime.planning.presets import shape

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
UNSEEN_BEGIN, UNSEEN_END = "<!-- unseen: begin -->", "<!-- unseen: end -->"
LIMIT = 0.15
HEAD = """\
| machine | model, layers | GPUs | what | measured | planned | off |
| --- | --- | --- | --- | ---: | ---: | ---: |"""
# Of the H200s' machine the record has no rates. Link: 11.2 GB of experts in 0.2023 s (h200.json). Matmul: its
# mma.sync rate. RAM: what 94 layers on the CPU alone come to: that row says nothing, the others do.
H200 = {"link": 55.4, "memory": 4800.0, "tflops": 639.2, "ram": 197.0}
H100_MEMORY_GBPS = 3350.0
VRAM_OF_H200_GIB = 131.0, 67.5  # that one and two of them had planned for all they have
ALL, ALL_OF_TWO = "all memory", "2 x all memory"
RAM_OF_16_CPUS = 151.0  # what 18 layers on the CPU alone come to at decode, as above


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, in tokens a second; of a start in seconds. num_runs: 1 where it was measured once."""

    machine: str
    model: str
    gpus: str
    what: str
    measured: float
    planned: float
    num_runs: int = 3

    @property
    def deviation(self) -> float:
        """Of the plan, relative to what was measured."""
        return self.planned / self.measured - 1

    def line(self) -> str:
        """Of the table."""
        digits = 0 if self.measured >= 100 else 1
        values = f"{self.measured:.{digits}f} | {self.planned:.{digits}f} | {self.deviation:+.0%}"
        return f"| {self.machine} | {self.model} | {self.gpus} | {self.what} | {values} |"


def _plan(name: str, layers: int, cpu_layout: str, hardware: HardwareSpec, prompt: int) -> Plan:
    spec = shape(name)
    sizes = sizes_of_shape(dataclasses.replace(spec, layers=spec.layers[:layers]), None, cpu_layout)
    return make_plan(sizes, hardware, Workload(prompt + 192, prompt))


def _decode_tokens_per_s(plan: Plan) -> float:
    """By the first GPU and the CPU: when the record was made, other GPUs did not decode."""
    alone = cost.decode(plan.sizes, plan.hardware, plan.workload, plan.gpus[:1])
    return alone.tokens_per_s


def _machine(
    gpus: int,
    vram: float,
    rates: dict[str, float],
    ram_bytes: float,
    cpus: int,
    isa: str = "avx512_vnni",  # before AMX was used
) -> HardwareSpec:
    one = GpuSpec(int(vram), given(rates["link"]), given(rates["memory"]), given(rates["tflops"]))
    host = describe_host(
        (one,) * gpus,
        ram_bytes=given(int(ram_bytes)),
        num_cores=given(cpus),
        ram_gbps=given(rates["ram"]),
        cpu_gmacs=None,
        disk_gbps=None,
        isa=isa,
    )
    return dataclasses.replace(host, pins_files=True)


def _h200_rows(path: Path) -> Iterator[Row]:
    name = "qwen3-235b-a22b"
    with h5py.File(path) as file:
        ram_gib = float(file["machine"].attrs["memory_gib"])
        for layers in (94, 45):
            cases = file[f"runs/reference/{name}, {layers} layers"]
            for gpus, vram, said in (
                (1, 16.0, "16 GiB"),
                (2, 16.0, "2 x 16 GiB"),
                (1, VRAM_OF_H200_GIB[0], ALL),
                (2, VRAM_OF_H200_GIB[1], ALL_OF_TWO),
                (0, 0.0, "none"),
            ):
                prompt, answer = (10_000, "tg128@10000") if gpus else (2048, "tg32@2048")
                subject = _subject(gpus, vram)
                if subject not in cases[f"pp{prompt}/threads-32"]:
                    continue
                hardware = _machine(gpus, vram * GIB, H200, ram_gib * GIB, 32)
                plan = _plan(name, layers, "cpu-i4-r32-b32", hardware, prompt)
                for what, case, planned in (
                    ("prefill", f"pp{prompt}", plan.prefill.tokens_per_s),
                    ("decode", answer, _decode_tokens_per_s(plan)),
                ):
                    if (said, what) == (ALL, "decode"):
                        continue  # by launches that have been fused since
                    measured = _median(cases[f"{case}/threads-32/{subject}"])
                    yield Row("H200, 32 CPUs", f"{name}, {layers}", said, what, measured, planned)
                if gpus:  # the record's CPU runs are of a version that opened bundles more slowly
                    runs = cases[f"pp{prompt}/threads-32/{subject}"]
                    yield _start_row("H200, 32 CPUs", f"{name}, {layers}", said, runs, plan)


def _start_row(machine: str, model: str, gpus: str, runs: h5py.Group, plan: Plan) -> Row:
    """From the command to the first token, in seconds. Runs differ by a quarter: one says little."""
    planned = plan.start_up.warm_s + plan.prefill.total_s
    what = "first token, s" + (" (one run)" if len(runs) == 1 else "")
    return Row(machine, model, gpus, what, _median(runs, "first_token_s"), planned, len(runs))


def _median(runs: h5py.Group, figure: str = "tokens_per_s") -> float:
    return statistics.median(float(run[figure][0]) for run in runs.values())


def _subject(gpus: int, vram: float) -> str:
    if not gpus:
        return "krasis, CPU alone"
    many = f"krasis, {gpus} GPU{'s' if gpus > 1 else ''}"
    return f"{many} of 16 GiB" if vram == 16 else f"{many}, all their memory"


def _h100_rows(path: Path) -> Iterator[Row]:
    stages = {one["stage"]: one["result"] for one in json.loads(path.read_text("utf-8"))["stages"]}
    for short, name in (("30b", "qwen3-30b-a3b"), ("235b", "qwen3-235b-a22b")):
        prefill, decode = stages[f"prefill-{short}"], stages[f"decode-{short}"]
        rates = {
            "link": prefill["rates"]["pinned_to_device_gbps"],
            "memory": H100_MEMORY_GBPS,
            "tflops": prefill["rates"]["matmul_tflops"],
            "ram": decode["host_read_gbps"],
        }
        streamed, runs = prefill["runs"]["all streamed"], decode["runs"]
        few = streamed["vram_bytes"]
        # Decode with all experts in VRAM was measured by launches that have been fused since.
        yield _h100_row(name, "all streamed", prefill, streamed, rates, few)
        yield _h100_row(name, "all streamed", decode, runs["all streamed"], rates, few)
        yield _h100_row(name, "none", decode, runs["CPU alone"], rates, 0)


def _h100_row(
    name: str, gpus: str, stage: dict[str, Any], run: dict[str, Any], rates: dict[str, float], vram: float
) -> Row:
    what, layers = "decode" if "prompt" in run else "prefill", stage["num_layers"]
    hardware = _machine(1 if vram else 0, vram, rates, 126 * GIB, 16)
    plan = _plan(name, layers, "cpu-q8-r32-b32", hardware, run.get("prompt", 10_000))
    planned = plan.prefill.tokens_per_s if what == "prefill" else plan.decode.tokens_per_s
    return Row("H100, 16 CPUs", f"{name}, {layers}", gpus, what, run["tokens_per_s"], planned)


def _rank_rows(path: Path) -> Iterator[Row]:
    name, layers = "qwen3-235b-a22b", 24
    said = {(1, 0.0): ALL, (2, 0.0): ALL_OF_TWO, (1, 16.0): "16 GiB", (2, 16.0): "2 x 16 GiB"}
    for run in json.loads(path.read_text("utf-8")):
        gpus, vram = run["gpus"], run["vram_gib"]
        hardware = _machine(gpus, (vram or VRAM_OF_H200_GIB[gpus - 1]) * GIB, H200, 236 * GIB, 32)
        planned = _plan(name, layers, "cpu-i4-r32-b32", hardware, 1000).decode.tokens_per_s
        measured = run["runs"]["1 row"]["tokens_per_s"]
        yield Row("H200, 32 CPUs", f"{name}, {layers}", said[gpus, vram], "decode", measured, planned)


def _h200_of_16_cpus(path: Path) -> Iterator[Row]:
    name, layers = "qwen3-235b-a22b", 18
    rates = {**H200, "ram": RAM_OF_16_CPUS}
    with h5py.File(path) as file:
        ram_gib = float(file["machine"].attrs["memory_gib"])
        cases = file[f"runs/reference/{name}, {layers} layers"]
        for gpus, said, prompt, answer in ((1, "16 GiB", 10_000, "tg128@10000"), (0, "none", 2048, "")):
            hardware = _machine(gpus, 16 * GIB, rates, ram_gib * GIB, 16, "amx_int8")
            plan = _plan(name, layers, "cpu-i4-r32-b32", hardware, prompt)
            planned = {f"pp{prompt}": ("prefill", plan.prefill), answer: ("decode", plan.decode)}
            for case, (what, one) in planned.items():
                if case:
                    measured = _median(cases[f"{case}/threads-16/{_subject(gpus, 16.0)}"])
                    yield Row("H200, 16 CPUs", f"{name}, {layers}", said, what, measured, one.tokens_per_s)
            runs = cases[f"pp{prompt}/threads-16/{_subject(gpus, 16.0)}"]
            yield _start_row("H200, 16 CPUs", f"{name}, {layers}", said, runs, plan)


def _family_rows(path: Path) -> Iterator[Row]:
    """Prefill with all experts streamed. Of dense layers the cut models have one."""
    stages = {one["stage"]: one["result"] for one in json.loads(path.read_text("utf-8"))["stages"]}
    found = stages["families"]
    rates = {
        "link": found["rates"]["pinned_to_device_gbps"],
        "memory": H200["memory"],
        "tflops": found["rates"]["matmul_tflops"],
        "ram": found["rates"]["host_read_gbps"],
    }
    for run in found["rows"]:
        name, spec = run["label"], shape(run["label"])
        dense = [layer for layer in spec.layers if layer.experts is None][:1]
        layers = (*dense, *(layer for layer in spec.layers if layer.experts is not None))
        cut = dataclasses.replace(spec, layers=layers[: run["num_layers"]])
        hardware = _machine(1, run["vram_bytes"], rates, 126 * GIB, 16)
        plan = make_plan(sizes_of_shape(cut, None, "cpu-q8-r32-b32"), hardware, Workload(10_192, 10_000))
        model, planned = f"{name}, {run['num_layers']}", plan.prefill.tokens_per_s
        yield Row("H200, 16 CPUs", model, "all streamed", "prefill", run["tokens_per_s"], planned)


def rows() -> tuple[list[Row], list[Row]]:
    """Those by which constants were set, and the others."""
    of_16_cpus = list(_h200_of_16_cpus(MEASURED / "reference-h200.h5"))
    families = list(_family_rows(MEASURED / "h200.json"))
    known = [
        *_h200_rows(MEASURED / "reference.h5"),
        *(row for row in of_16_cpus if row.what.startswith("first token")),
        *_rank_rows(MEASURED / "rank_decode.json"),
        *_h100_rows(MEASURED / "h100.json"),
        *(row for row in families if row.model.startswith("gpt-oss")),
    ]
    return known, [row for row in (*of_16_cpus, *families) if row not in known]


def table(found: list[Row], begin: str = BEGIN, end: str = END) -> str:
    """With its marks."""
    return "\n".join((begin, HEAD, *(row.line() for row in found), end))


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Print the table, write nothing; fail where a plan is far off.")
def main(*, check: bool) -> None:
    """The document, or the check."""
    known, unseen = rows()
    if check:
        for what, found in (("plans", known), ("plans that no constant was set by", unseen)):
            click.echo(table(found))
            far = [row for row in found if abs(row.deviation) > LIMIT]
            click.echo(f"{len(far)} of {len(found)} {what} are more than {LIMIT:.0%} off", err=True)
        sys.exit(any(abs(row.deviation) > LIMIT and row.num_runs > 1 for row in known))
    path = ROOT / "docs" / "PLANNING.md"
    text = path.read_text("utf-8")
    for found, begin, end in ((known, BEGIN, END), (unseen, UNSEEN_BEGIN, UNSEEN_END)):
        before, first, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if not first or not last:
            raise click.ClickException(f"{path} has no {begin} ... {end}")
        text = before + table(found, begin, end) + after
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
