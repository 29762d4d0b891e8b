"""The options of stage ``reference``, and what they make of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from scripts.bench import provision
from scripts.bench.facts import REPOSITORY, note_machine
from scripts.bench.machine import compute_capability
from scripts.bench.peers import IK, KRASIS
from scripts.bench.provision import Found
from scripts.bench.record import REFERENCE, Record
from scripts.bench.reference import watch
from scripts.bench.reference.files import Kind, Say
from scripts.bench.reference.rows import BOTH, WHOLE, Sizes
from scripts.bench.reference.work import Deadline, Request, Stage
from scripts.models.model_shapes import SHAPES

PROMPT, GENERATE = 10_000, 128
RESERVE_BYTES = 20 * watch.GIB
OPTIONS = (
    click.option(
        "--shape",
        type=click.Choice(sorted(SHAPES)),
        default="qwen3-235b-a22b",
        show_default=True,
        help="reference: the model.",
    ),
    click.option(
        "--layers", type=click.IntRange(min=0), default=0, help="reference: at most so many; 0: all that fit."
    ),
    click.option(
        "--memory-gib",
        type=click.FloatRange(min=0.001),
        help="reference: memory for files and programs together [default: 20 GiB less than there is].",
    ),
    click.option(
        "--cap-gib",
        type=click.FloatRange(min=0.001),
        default=16.0,
        show_default=True,
        help="reference: memory that Krasis may use of each GPU.",
    ),
    click.option(
        "--reference-prompt",
        type=click.IntRange(min=1),
        default=PROMPT,
        show_default=True,
        help="Its tokens.",
    ),
    click.option(
        "--rows", multiple=True, help="reference: only rows whose name holds this; may be repeated."
    ),
    click.option(
        "--depth",
        "depths",
        type=click.Choice([WHOLE, BOTH]),
        multiple=True,
        help="reference: only all layers (whole), or only those that llama.cpp fits beside (both).",
    ),
    click.option(
        "--first-round",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="reference: rounds before are another machine's; --pairs counts them.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cuda", "double"]),
        default="cuda",
        show_default=True,
        help="reference: double tries it on a machine without a GPU.",
    ),
)


def run(record: Record, given: dict[str, Any], budget_s: float, say: Say) -> bool:
    """All that is left of the stage, or as much as the budget allows. Returns whether all is done."""
    work = Path(given["work"]).absolute()
    note_machine(record, [REFERENCE])
    ik = provision.given(given["ik"], "--ik-llama-bench")
    cuda = compute_capability() if given["device"] == "cuda" else ""
    record.set_facts(
        "programs", {KRASIS: provision.repository_state(REPOSITORY), IK: ik.recipe or ik.missing}
    )

    def llama() -> Found:
        return provision.llama_bench(given["llama"], work, cuda)

    def kt() -> Found:
        return provision.kt_kernel(given["kt"], work)

    stage = Stage(record, request(given, work), llama, ik, kt, Deadline(budget_s), say)
    say(f"layers: {stage.layers}")
    return stage.run()


def request(given: dict[str, Any], work: Path) -> Request:
    """What the options ask for."""
    memory = given["memory_gib"]
    memory_bytes = int(memory * watch.GIB) if memory else installed_bytes() - RESERVE_BYTES
    sizes = Sizes(
        given["reference_prompt"],
        min(GENERATE, given["reference_prompt"]),
        int(given["cap_gib"] * watch.GIB),
        max(given["threads"]) if given["threads"] != (1, 2) else len(os.sched_getaffinity(0)),
        given["device"],
    )
    return Request(
        Kind(given["shape"]),
        sizes,
        tuple(given["gpus"]),
        given["pairs"],
        memory_bytes,
        given["layers"],
        given["timeout_s"],
        work,
        given["rows"],
        given["first_round"],
        given["depths"] or (WHOLE, BOTH),
    )


def installed_bytes() -> int:
    """The machine's memory. One whose memory grows as it is used shows less: give --memory-gib there."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
