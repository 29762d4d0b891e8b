"""Figures for Prometheus: what the core counts, under vLLM's names with our prefix, and times that requests
took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from krasis.runtime.serving.api import CoreStatus

PREFIX = "krasis_"
_LATENCY_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.5, 5.0, 10.0, 60.0)


class Metrics:
    """Observes requests and writes everything in Prometheus' text format. status: asks the core."""

    def __init__(self, status: Callable[[], CoreStatus], model: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self._registry}
        names = ["model_name"]
        labels = {"model_name": model}
        self._first = Histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "Until a first token.",
            names,
            buckets=_LATENCY_S,
            **shared,
        ).labels(**labels)
        self._between = Histogram(
            f"{PREFIX}inter_token_latency_seconds", "Between tokens.", names, buckets=_TOKEN_S, **shared
        ).labels(**labels)
        self._whole = Histogram(
            f"{PREFIX}e2e_request_latency_seconds", "Of whole requests.", names, buckets=_LATENCY_S, **shared
        ).labels(**labels)
        self._success = Counter(
            f"{PREFIX}request_success", "Requests, by how they ended.", [*names, "finished_reason"], **shared
        )
        self._labels = labels
        self._registry.register(_CoreCollector(status))

    def first_token(self, seconds: float) -> None:
        """An answer begins."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """It goes on."""
        self._between.observe(seconds)

    def finished(self, reason: str, num_prompt: int, num_generated: int, seconds: float) -> None:
        """It ends."""
        del num_prompt, num_generated  # the core counts them, of cancelled requests as well
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._whole.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """(everything, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


_GAUGES: dict[str, tuple[str, Callable[[CoreStatus], float]]] = {
    "num_requests_running": ("Requests being computed.", lambda one: one.num_running),
    "num_requests_waiting": ("Requests in the queue.", lambda one: one.num_waiting),
    "kv_cache_usage_perc": ("Share of all slots' positions in use.", lambda one: one.cache_usage),
    "prefix_store_bytes": ("RAM that stored prefixes take.", lambda one: one.store_bytes),
    "prefix_store_entries": ("Prefixes in RAM.", lambda one: one.num_stored),
}
_COUNTERS: dict[str, tuple[str, str]] = {
    "prefix_cache_queries": ("num_prefix_queries", "Prompt tokens looked up."),
    "prefix_cache_hits": ("num_prefix_hits", "Prompt tokens found, and not computed."),
    "prompt_tokens": ("num_prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("num_generated_tokens", "Tokens of answers."),
    "requests": ("num_requests", "Requests taken on."),
    "engine_restarts": ("num_restarts", "Times that the engine was started again after it was lost."),
    "requests_refused": ("num_refused", "Requests refused at submission."),
    "passes": ("num_passes", "Passes over the experts for prompts."),
    "shared_passes": ("num_shared_passes", "Passes that served several prompts."),
    "pass_rows": ("num_pass_rows", "Prompt tokens computed in passes."),
    "pass_seconds": ("pass_s", "Time in passes."),
    "decode_steps": ("num_decode_steps", "Decode batches."),
    "decode_rows": ("num_decode_rows", "Answers in decode batches."),
    "spec_decode_num_drafts": ("num_drafts", "Decode batches with guessed tokens."),
    "spec_decode_num_draft_tokens": ("num_drafted", "Guessed tokens."),
    "spec_decode_num_accepted_tokens": ("num_accepted", "Guessed tokens that were right."),
    "decode_seconds": ("decode_s", "Time in decode batches."),
    "requests_joined": ("num_joined", "Requests that waited for another's pass."),
    "prefixes_evicted": ("num_evicted", "Prefixes dropped for room."),
    "prefixes_stored": ("num_stored", "Prefixes moved from a slot into RAM."),
    "prefixes_restored": ("num_restored", "Prefixes moved back into a slot."),
}


class _CoreCollector:
    """The core's own counts, read when they are asked for."""

    def __init__(self, status: Callable[[], CoreStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status()
        for name, (what, value) in _GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, what, value=value(status))
        for name, (attribute, what) in _COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, what, value=getattr(status.counters, attribute))
