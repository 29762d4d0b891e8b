"""Figures under llama.cpp's names, for dashboards made for it."""

from __future__ import annotations

from krasis.runtime.serving.api import CoreStatus


def llama_metrics(status: CoreStatus) -> str:
    """Prometheus' text."""
    sums = status.counters
    computed = max(sums.num_prompt_tokens - sums.num_prefix_hits, 0)
    counters: dict[str, tuple[str, float]] = {
        "prompt_tokens_total": ("Prompt tokens computed.", computed),
        "prompt_tokens_cached_total": ("Prompt tokens found, and not computed.", sums.num_prefix_hits),
        "prompt_seconds_total": ("Time in passes.", sums.pass_s),
        "tokens_predicted_total": ("Tokens of answers.", sums.num_generated_tokens),
        "tokens_predicted_seconds_total": ("Time in decode batches.", sums.decode_s),
        "n_decode_total": ("Passes and decode batches.", sums.num_passes + sums.num_decode_steps),
        "n_tokens_max": ("Most tokens in a slot.", max((one.num_tokens for one in status.slots), default=0)),
        "spec_decode_num_draft_tokens_total": ("Tokens drafted.", sums.num_drafted),
        "spec_decode_num_accepted_tokens_total": ("Drafted tokens kept.", sums.num_accepted),
        "spec_decode_num_drafts_total": ("Drafts.", sums.num_drafts),
    }
    gauges: dict[str, tuple[str, float]] = {
        "prompt_tokens_seconds": ("Prompt tokens a second.", _rate(sums.num_pass_rows, sums.pass_s)),
        "predicted_tokens_seconds": (
            "Tokens a second.",
            _rate(sums.num_decode_rows + sums.num_accepted, sums.decode_s),
        ),
        "requests_processing": ("Requests being computed.", status.num_running),
        "requests_deferred": ("Requests in the queue.", status.num_waiting),
        "n_busy_slots_per_decode": (
            "Answers in a decode batch.",
            _rate(sums.num_decode_rows, sums.num_decode_steps),
        ),
    }
    lines = []
    for kind, group in (("counter", counters), ("gauge", gauges)):
        for name, (what, value) in group.items():
            full = f"llamacpp:{name}"
            lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}", f"{full} {float(value)!r}"]
    return "\n".join([*lines, ""])


def _rate(count: float, of: float) -> float:
    return count / of if of > 0 else 0.0
