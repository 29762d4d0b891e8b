"""Requests, events and figures as JSON, and back."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from krasis.formats.errors import NativeError
from krasis.runtime.server.engine.errors_told import heard, told
from krasis.runtime.server.grammar import Grammar, MaskRecipe
from krasis.runtime.serving.api import (
    CoreStatus,
    Counters,
    Delta,
    Event,
    Failed,
    Finished,
    Progress,
    PromptScores,
    Request,
    Score,
    SlotStatus,
    Timings,
    Usage,
)
from krasis.runtime.settings import SamplingSettings

Recipe = Callable[[Grammar, tuple[str, ...]], MaskRecipe]
_APART = ("prompt", "sampling", "stops", "logit_bias", "make_mask")
_PLAIN = tuple(one.name for one in fields(Request) if one.name not in _APART)


def of_request(request: Request) -> tuple[dict[str, Any], bytes]:
    """(all but the prompt, the prompt's ids). Raises NativeError for a mask that only this process can make,
    OverflowError for an id that is none."""
    mask = request.make_mask
    if mask is not None and not isinstance(mask, MaskRecipe):
        raise NativeError("this mask cannot be sent to the engine", got=type(mask).__name__)
    said = {name: getattr(request, name) for name in _PLAIN}
    said["sampling"] = asdict(request.sampling)
    said["stops"] = list(request.stops)
    said["logit_bias"] = list(request.logit_bias.items())
    said["mask"] = None if mask is None else [asdict(mask.grammar), list(mask.closes)]
    return said, array("q", request.prompt).tobytes()


def to_request(said: dict[str, Any], prompt: bytes, recipe: Recipe) -> Request:
    """The request. recipe: makes what makes a mask, of a grammar and the markers that end the thinking."""
    mask = said["mask"]
    return Request(
        prompt=array("q", prompt).tolist(),
        sampling=SamplingSettings(**said["sampling"]),
        stops=tuple(said["stops"]),
        logit_bias={int(token): value for token, value in said["logit_bias"]},
        make_mask=None if mask is None else recipe(Grammar(**mask[0]), tuple(mask[1])),
        **{name: said[name] for name in _PLAIN},
    )


def of_event(event: Event) -> list[Any]:
    """The event, its kind first."""
    if isinstance(event, Delta):
        scores = [_of_score(one) for one in event.scores]
        return ["delta", list(event.tokens), event.text, event.kind, scores]
    if isinstance(event, Progress):
        return ["progress", event.num_processed, event.num_total, event.num_cached, event.elapsed_s]
    if isinstance(event, PromptScores):
        return ["scores", [None if one is None else _of_score(one) for one in event.scores]]
    figures = [asdict(event.usage), asdict(event.timings)]
    if isinstance(event, Finished):
        return ["finished", event.reason, *figures, event.stop]
    return ["failed", told(event.error), *figures]


def to_event(said: Sequence[Any]) -> Event:
    """The event. Raises NativeError for an unknown kind."""
    kind, *values = said
    if kind == "delta":
        tokens, text, of_what, scores = values
        return Delta(tuple(tokens), text, of_what, tuple(_to_score(one) for one in scores))
    if kind == "progress":
        return Progress(*values)
    if kind == "scores":
        return PromptScores(tuple(None if one is None else _to_score(one) for one in values[0]))
    if kind == "finished":
        reason, usage, timings, stop = values
        return Finished(reason, Usage(**usage), Timings(**timings), stop)
    if kind == "failed":
        error, usage, timings = values
        return Failed(heard(error), Usage(**usage), Timings(**timings))
    raise NativeError("the engine tells of an unknown event", got=kind)


def of_status(status: CoreStatus) -> dict[str, Any]:
    """The figures."""
    return asdict(status)


def to_status(said: dict[str, Any]) -> CoreStatus:
    """The figures."""
    slots = tuple(SlotStatus(**one) for one in said["slots"])
    return CoreStatus(**{**said, "slots": slots, "counters": Counters(**said["counters"])})


def _of_score(score: Score) -> list[Any]:
    return [score.token, score.logprob, score.rank, score.top]


def _to_score(said: Sequence[Any]) -> Score:
    token, logprob, rank, top = said
    return Score(token, logprob, rank, tuple((number, value) for number, value in top))
