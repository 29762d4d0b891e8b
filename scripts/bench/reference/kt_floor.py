"""What KTransformers must take at least: kt-kernel's MoE layer on the same cores, times the layers.

The whole program needs SGLang and a CUDA build of torch of its own version, which a machine without a
package index cannot get. Its experts run in kt-kernel, whose wheel is small: what its layers alone take is a
floor for the time of its whole, as is the step that hands experts to the GPU where its prefill runs there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.bench.peers import KT, last_json
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.reference import watch
from scripts.bench.reference.results import STAGE
from scripts.models.model_shapes import SHAPES

if TYPE_CHECKING:
    from scripts.bench.reference.files import Say
    from scripts.bench.reference.work import Deadline, Request

RUNNER = ("-m", "scripts.bench.kt_floor_runner")
HANDED = "experts handed to the GPU"
FORMATS = ("rawint4", "amxint4")
TOKENS = (1, 512, 2048, 10_000)
EXPECTED_S = 75.0


def left(record: Record, request: Request) -> list[str]:
    """What the record lacks, as it names it."""
    held = {run.subject for run in record.runs(STAGE) if run.model == model_of(request)}
    return [subject for kind in FORMATS if (subject := f"{KT} {kind}") not in held]


def model_of(request: Request) -> str:
    """As the record names it."""
    return f"{request.kind.shape}, one layer"


def run(record: Record, request: Request, kt: Found, deadline: Deadline, say: Say) -> bool:
    """Every format once; false if there was no time for it."""
    model = model_of(request)
    for subject in left(record, request):
        kind = subject.removeprefix(f"{KT} ")
        if kt.path is None:
            record.add([_failed(model, subject, request.sizes.threads, kt.missing)])
            continue
        if not deadline.allows(EXPECTED_S):
            return False
        path = os.pathsep.join(filter(None, (str(kt.path), os.environ.get("PYTHONPATH"))))
        watched = watch.run(_command(RUNNER, request, kind), {"PYTHONPATH": path}, 300)
        _keep(record, model, subject, request.sizes.threads, watched, say)
    return True


def _command(runner: Sequence[str], request: Request, kind: str) -> list[str]:
    shape = SHAPES[request.kind.shape]
    sizes = {
        "--hidden": shape.hidden_size,
        "--intermediate": shape.moe_intermediate_size,
        "--experts": shape.num_experts,
        "--top-k": shape.num_experts_per_tok,
        "--threads": request.sizes.threads,
        "--repeats": 3,
        "--format": kind,
        "--tokens": ",".join(str(min(count, request.sizes.prompt)) for count in TOKENS),
    }
    return [sys.executable, *runner, *(str(part) for pair in sizes.items() for part in pair)]


def _keep(record: Record, model: str, subject: str, threads: int, watched: watch.Watched, say: Say) -> None:
    outcome = watched.outcome
    if outcome.error:
        record.add([_failed(model, subject, threads, outcome.error)])
        say(f"{subject}: {outcome.error}")
        return
    found = last_json(outcome.output, "{")
    common: dict[str, Any] = outcome.facts | {"stage": STAGE, "model": model, "threads": threads, "round": 0}
    record.add(
        Run(
            case=case,
            subject=subject,
            metrics={
                "seconds": tuple(float(one) for one in samples),
                "calls_a_wait": (float(found["calls_a_wait"][case]),),
            },
            version=str(found["version"]),
            **common,
        )
        for case, samples in found["seconds"].items()
    )
    say(
        f"{subject}: "
        + ", ".join(f"{case} {min(all_) * 1e3:.2f} ms" for case, all_ in found["seconds"].items())
    )


def _failed(model: str, subject: str, threads: int, error: str) -> Run:
    return Run(stage=STAGE, model=model, case="layer", threads=threads, subject=subject, round=0, error=error)
