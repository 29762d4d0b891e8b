"""What a program's output says, as runs of the record."""

from __future__ import annotations

from typing import Any

from scripts.bench.peers import KRASIS, last_json
from scripts.bench.record import Run
from scripts.bench.reference.rows import Row
from scripts.bench.reference.watch import Watched

STAGE = "reference"
FIRST_RUN_DONE = ": prompt run 1/"
WARM_UP = ": warmup prompt run"
Metrics = dict[str, dict[str, tuple[float, ...]]]


def runs_of(row: Row, watched: Watched, model: str, threads: int, number: int) -> list[Run]:
    """One run a case; a failure gives the same runs with its error."""
    error, version = watched.outcome.error, ""
    metrics: Metrics = {}
    if not error:
        try:
            metrics, version = parse(row, watched)
        except (ValueError, LookupError, TypeError) as problem:
            error = f"output not understood: {problem}"
    common: dict[str, Any] = watched.outcome.facts | {"stage": STAGE, "model": model, "threads": threads}
    return [
        Run(
            case=case,
            subject=row.subject,
            round=number,
            metrics=metrics.get(case, {}),
            version=version,
            error=error or ("" if case in metrics else "the program did not report this case"),
            **common,
        )
        for case in row.cases
    ]


def parse(row: Row, watched: Watched) -> tuple[Metrics, str]:
    """(samples by case and metric, version). Raises ValueError for other output."""
    output = watched.outcome.output
    cases, seconds, version = _krasis(output) if row.program == KRASIS else _llama(row, output)
    first_token_s = seconds if seconds is not None else first_token(watched.stamps)
    memory = {
        "host_bytes": (float(watched.host_bytes),),
        **({"vram_bytes": tuple(float(one) for one in watched.vram_bytes)} if watched.vram_bytes else {}),
        **({"first_token_s": (first_token_s,)} if first_token_s is not None else {}),
    }
    return {case: {"tokens_per_s": (rate,), **memory} for case, rate in cases.items()}, version


def _krasis(output: str) -> tuple[dict[str, float], float | None, str]:
    result = last_json(output, "{")
    cases = {case: float(found["tokens_per_s"][0]) for case, found in result["cases"].items()}
    return cases, float(result["first_token_s"]), f"library {result['library']}"


def _llama(row: Row, output: str) -> tuple[dict[str, float], float | None, str]:
    """The prompt's rate as reported; the answer's from what prompt and answer took beyond the prompt."""
    rows: list[dict[str, Any]] = last_json(output, "[")
    prompt_s = answer_s = None
    for found in rows:
        seconds = float(found["samples_ns"][0]) / 1e9
        if int(found["n_gen"]) == 0:
            prompt_s = seconds
        else:
            answer_s = seconds
    if prompt_s is None or answer_s is None or not 0 < prompt_s < answer_s:
        raise ValueError(f"llama-bench gave no prompt with and without an answer: {prompt_s}, {answer_s}")
    prefill, decode = row.cases
    version = f"{rows[0]['build_commit']} ({rows[0]['build_number']})"
    return {prefill: row.prompt / prompt_s, decode: row.generate / (answer_s - prompt_s)}, None, version


def first_token(stamps: tuple[tuple[float, str], ...]) -> float | None:
    """Seconds to the end of llama-bench's first prompt, its warm-up: when the first timed one begins. None if
    it had no warm-up, or said nothing.
    """
    if not any(WARM_UP in line for _, line in stamps):
        return None
    return next((seconds for seconds, line in stamps if FIRST_RUN_DONE in line), None)
