"""Several requests at once, every expert in host RAM: prompts that share a pass, an answer that goes on
during another's prompt, and tokens of several answers in one step.

As many layers of the shape as RAM holds. What depends on their number is also told for the whole model: each
layer costs what it costs here, pauses by the clock stay what they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.backend import Backend
from krasis.runtime.batch import Batch, batch_of
from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.gpu.prefill import LONG_LAYER_S, LONGER_LAYER_S, MAX_AHEAD
from krasis.runtime.open_backend import open_backend
from krasis.runtime.planning.cost import distinct_experts
from krasis.runtime.planning.sizes import ExpertSizes, sizes_of_bundle
from krasis.runtime.serving.api import Delta, Failed, Request
from krasis.runtime.serving.between import MOST_PAUSE_S, SHARE
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings, ModelSide
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import EngineSettings, SamplingSettings
from krasis.runtime.text.end_tokens import Stops
from krasis.runtime.text.ends import TextEnds
from krasis.runtime.text.thinking import ThinkingSplitter
from krasis.runtime.text.tokenizer import TokenStream
from scripts.device import places
from scripts.device.context import Context
from scripts.device.limits import streaming_vram_bytes

LABEL = "235b"
PROMPTS = 4  # that share a pass
ROWS = {"real": (1, 2, 4, 8), "tiny": (1, 2)}  # answers in one step
BEFORE = 32  # tokens before them
WARM_UP = {"real": 4, "tiny": 1}
FIRST_TOKENS = 4  # of an answer, before another's prompt comes
MORE_POSITIONS = 64
GAP_GOAL_S, SHARED_GOAL, LAW_GOAL = 0.6, 3.0, 1.1
WAIT_S = 120.0

Record = dict[str, Any]


class Work:
    """A backend and random tokens for it."""

    def __init__(self, context: Context, backend: Backend) -> None:
        self.sizes, self.warm_up, self.backend = context.sizes, WARM_UP[context.size], backend
        self._random = np.random.default_rng(3)

    def tokens(self, count: int) -> list[int]:
        """Random ones, by which experts are chosen evenly."""
        return self._random.integers(0, self.backend.spec.vocab, count).tolist()

    def run_s(self, batch: Batch) -> float:
        """Seconds of a batch. Raises ValueError if a logit is not finite."""
        begin = time.perf_counter()
        logits = self.backend.run(batch)
        seconds = time.perf_counter() - begin
        if not np.isfinite(logits).all():
            raise ValueError("logits are not finite")
        return seconds

    def prompts_s(self, count: int, num_tokens: int) -> float:
        """Seconds of so many prompts in one pass."""
        slots = [self.backend.state.open() for _ in range(count)]
        seconds = self.run_s(batch_of([(slot, 0, self.tokens(num_tokens), "last") for slot in slots]))
        for slot in slots:
            self.backend.state.close(slot)
        return seconds


def run(context: Context) -> Record:
    """See the module."""
    path, made = places.bundle_in_ram(context, LABEL)
    positions = context.sizes.prompt_tokens + MORE_POSITIONS
    settings = EngineSettings(
        device=context.device,
        context=positions,
        prefault=False,
        slots=slots_of(context),
        vram_bytes=vram_bytes(context, path, positions),
    )
    with ExitStack() as closing:
        begin = time.perf_counter()
        bundle = closing.enter_context(open_bundle(path, settings))
        backend = open_backend(bundle, settings)
        closing.callback(backend.close)
        open_s = time.perf_counter() - begin
        sizes = sizes_of_bundle(bundle.manifest)
        work = Work(context, backend)
        work.prompts_s(1, context.sizes.prompt_tokens)  # waits for what is loaded in the background
        result = {
            **made,
            "description": backend.description,
            "open_s": open_s,
            "shared": shared(work),
            "rows": [rows_of(work, count) for count in ROWS[context.size]],
            "pass": pass_alone(work),
        }
        against_law(result["rows"], next(iter(sizes.expert_layers))[1])
        result["between"] = between(work, result)
    return result


def vram_bytes(context: Context, path: Path, positions: int) -> int:
    """So much that every expert is streamed, in one pass, with a slot for each answer."""
    with Bundle.open(path) as bundle:
        kv_bytes = sizes_of_bundle(bundle.manifest).kv_bytes(positions, "bf16")
        return streaming_vram_bytes(bundle, positions, context.device) + (slots_of(context) - 1) * kv_bytes


def slots_of(context: Context) -> int:
    """Sequences at once."""
    return max(PROMPTS, *ROWS[context.size])


# ---- prompts -----------------------------------------------------------------------------------------------


def shared(work: Work) -> Record:
    """Prompts one after another, and in one pass."""
    num_tokens = max(1, work.sizes.prompt_tokens // 10)
    together, alone = [], []
    for _ in range(work.sizes.repeats):
        alone.append(sum(work.prompts_s(1, num_tokens) for _ in range(PROMPTS)))
        together.append(work.prompts_s(PROMPTS, num_tokens))
    alone_s, together_s = statistics.median(alone), statistics.median(together)
    return {
        "num_prompts": PROMPTS,
        "num_tokens": num_tokens,
        "alone_s": alone_s,
        "together_s": together_s,
        "ratio": alone_s / together_s,
        "goal": SHARED_GOAL,
    }


def pass_alone(work: Work) -> Record:
    """A long prompt, while nobody listens and while somebody is told of each layer."""
    quiet, told = [], []
    for _ in range(max(1, work.sizes.repeats // 2)):
        work.backend.layer_done = None
        quiet.append(work.prompts_s(1, work.sizes.prompt_tokens))
        work.backend.layer_done = lambda done, total: None
        told.append(work.prompts_s(1, work.sizes.prompt_tokens))
    work.backend.layer_done = None
    return {"quiet_s": statistics.median(quiet), "told_s": statistics.median(told)}


# ---- tokens ------------------------------------------------------------------------------------------------


def rows_of(work: Work, count: int) -> Record:
    """Steps of so many answers at once."""
    backend = work.backend
    slots = [backend.state.open() for _ in range(count)]
    before = min(BEFORE, work.sizes.prompt_tokens)
    backend.run(batch_of([(slot, 0, work.tokens(before), "none") for slot in slots]))
    seconds, on_cpu, waiting = [], [], []
    num_steps = min(work.sizes.decode_tokens, MORE_POSITIONS // 2) + work.warm_up
    for step in range(num_steps):
        batch = batch_of([(slot, before + step, work.tokens(1), "last") for slot in slots])
        seconds.append(work.run_s(batch))
        split = getattr(backend, "last_decode_split", None) or {}
        on_cpu.append(split.get("cpu_experts_s", 0.0))
        waiting.append(split.get("wait_gpu_s", 0.0))
    for slot in slots:
        backend.state.close(slot)
    return {
        "rows": count,
        "median_s": statistics.median(seconds[work.warm_up :]),
        "cpu_experts_s": statistics.median(on_cpu[work.warm_up :]),
        "wait_gpu_s": statistics.median(waiting[work.warm_up :]),
        "tokens_per_s": count / statistics.median(seconds[work.warm_up :]),
    }


def against_law(rows: list[Record], experts: ExpertSizes) -> None:
    """Says of each number of rows what one row's time makes expect: the experts' part grows by the distinct
    experts that so many rows choose at random, the rest stays."""
    one = rows[0]
    rest_s = one["median_s"] - one["cpu_experts_s"]
    for row in rows:
        row["distinct"] = distinct_experts(experts, row["rows"])
        row["expected_s"] = rest_s + one["cpu_experts_s"] * row["distinct"] / rows[0]["distinct"]
        row["ratio"] = row["median_s"] / row["expected_s"]


# ---- an answer during another's prompt ---------------------------------------------------------------------


class Clock:
    """Times a backend's batches. passes: (begin, end) of prompts. steps_s: of batches between their layers,
    what lies before them on the device's stream included."""

    def __init__(self, backend: Backend, least_rows: int) -> None:
        self._run, self._least_rows, self._is_passing = backend.run, least_rows, False
        self.passes: list[tuple[float, float]] = []
        self.steps_s: list[float] = []
        backend.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Batch) -> Any:
        """In the backend's place."""
        is_long, was_passing = len(batch.tokens) >= self._least_rows, self._is_passing
        self._is_passing = was_passing or is_long
        begin = time.perf_counter()
        try:
            return self._run(batch)
        finally:
            end = time.perf_counter()
            self._is_passing = was_passing
            if was_passing:
                self.steps_s.append(end - begin)
            elif is_long:
                self.passes.append((begin, end))


class Dots:
    """A tokenizer: every id is a dot."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Its text."""
        return "." * len(ids)


def ends(_: Request) -> TextEnds:
    """None: answers go on till they are cancelled."""
    stream: Any = TokenStream(Dots())  # type: ignore[arg-type]
    return TextEnds(frozenset(), Stops(), stream, ThinkingSplitter())


def between(work: Work, result: Record) -> Record:
    """The longest time without a token of an answer while a long prompt is computed. Ends the backend.

    The pause that the core makes between two tokens is as much shorter as the layers are fewer.
    """
    share = result["num_layers"] / result["model_layers"]
    limits = Limits(pass_rows=work.backend.prefill_chunk, company_s=0.0)
    usual_pause_s = limits.between_s
    limits = Limits(pass_rows=limits.pass_rows, company_s=0.0, between_s=usual_pause_s * share)
    clock = Clock(work.backend, work.sizes.prompt_tokens)
    spec = work.backend.spec
    model = ModelSide(spec.vocab, len(spec.layers), ends)
    core = EngineCore(work.backend, model, CoreSettings(num_slots=2, limits=limits))
    core.start()
    sampling = SamplingSettings(temperature=1.0, top_k=20, seed=1)
    common: Record = {"id": "", "sampling": sampling, "ignore_ends": True, "use_cache": False}
    answer = core.submit(Request(prompt=work.tokens(min(BEFORE, 8)), **common))
    times, has_begun = read_times(answer)
    if not has_begun.wait(WAIT_S):
        raise ValueError("no token came")
    prompt = core.submit(Request(prompt=work.tokens(work.sizes.prompt_tokens), max_tokens=2, **common))
    events = list(prompt.events(WAIT_S))
    time.sleep(0.1)  # a token more after it
    answer.cancel()
    core.close(save_prefixes=False)
    if isinstance(events[-1], Failed):
        raise events[-1].error
    begin_s, end_s = clock.passes[-1]
    edges = [at for at in times if begin_s < at < end_s]
    after = [at for at in times if at >= end_s][:1] or [end_s]
    before = [at for at in times if at <= begin_s][-1:] or [begin_s]
    gaps = np.diff([*before, *edges, *after])
    return {
        "pass_s": end_s - begin_s,
        "num_tokens": len(clock.steps_s),
        "longest_gap_s": float(gaps.max()),
        "pause_s": limits.between_s,
        "longest_step_s": max(clock.steps_s, default=0.0),
        "goal_s": GAP_GOAL_S,
        "whole_model_gap_s": whole_gap_s(result, max(clock.steps_s, default=0.0), usual_pause_s),
    }


def read_times(answer: Any) -> tuple[list[float], Event]:
    """When its tokens come, read by a thread; and whether some have."""
    times: list[float] = []
    has_begun = Event()

    def read() -> None:
        for event in answer.events(WAIT_S):
            if isinstance(event, Delta):
                times.append(time.perf_counter())
                if len(times) >= FIRST_TOKENS:
                    has_begun.set()

    Thread(target=read, daemon=True).start()
    return times, has_begun


def whole_gap_s(result: Record, step_s: float, pause_s: float) -> float:
    """The gap with all layers of the model: the pause, till the layer then under way is done, and a step: the
    layers that are submitted already, and a token through all layers."""
    layer_s = result["pass"]["told_s"] / result["num_layers"]
    num_ahead = MAX_AHEAD - (layer_s >= LONG_LAYER_S) - (layer_s >= LONGER_LAYER_S)
    ahead_s = min(step_s, num_ahead * layer_s)
    whole_step_s = ahead_s + (step_s - ahead_s) * result["model_layers"] / result["num_layers"]
    return float(max(pause_s, min(SHARE * whole_step_s, MOST_PAUSE_S)) + layer_s + whole_step_s)
