"""What krasis-run says about its own work: the last line, and the JSON object of --json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from krasis.runtime.engine import Engine
from krasis.runtime.generation import Generation
from krasis.runtime.host.prefault import ENOUGH_HUGE
from krasis.runtime.settings import SamplingSettings

JSON_VERSION = 1


def summary_line(stats: Generation, engine: Engine) -> str:
    """``load 0.02 s; prompt 12 tokens, 410 tok/s on CPU; answer 80 tokens, 95 tok/s on CPU; first token 0.03
    s``.
    """
    prefilled_on, decoded_on = engine.placement
    cached = f" ({stats.num_cached_tokens} cached)" if stats.num_cached_tokens else ""
    return (
        f"load {engine.load_s:.2f} s; "
        f"prompt {stats.num_prompt_tokens} tokens{cached}, "
        f"{stats.prefill_tokens_per_s:.1f} tok/s on {prefilled_on}; "
        f"answer {len(stats.tokens)} tokens, {stats.decode_tokens_per_s:.1f} tok/s on {decoded_on}"
        f"{_drafts(stats)}; "
        f"first token {stats.time_to_first_token_s:.2f} s"
    )


def speed_line(stats: Generation, engine: Engine) -> str:
    """``12 tokens, 95.1 tok/s on CPU; prompt 80 tokens, 410.0 tok/s on CPU``."""
    prefilled_on, decoded_on = engine.placement
    cached = f" ({stats.num_cached_tokens} cached)" if stats.num_cached_tokens else ""
    return (
        f"[{len(stats.tokens)} tokens, {stats.decode_tokens_per_s:.1f} tok/s on {decoded_on}"
        f"{_drafts(stats)}; "
        f"prompt {stats.num_prompt_tokens} tokens{cached}, "
        f"{stats.prefill_tokens_per_s:.1f} tok/s on {prefilled_on}]"
    )


def _drafts(stats: Generation) -> str:
    """`` (30 of 40 guesses right)``; empty where none were made."""
    drafts = stats.drafts
    return f" ({drafts.num_accepted} of {drafts.num_drafted} guesses right)" if drafts.num_drafted else ""


def banner(engine: Engine) -> str:
    """``tiny: qwen3_moe, 4 layers of 8 experts; context 2,048 tokens; runs on CPU``."""
    spec = engine.bundle.spec
    count = max(spec.experts_of(layer).count for layer in spec.expert_layers)
    prefills_on, decodes_on = engine.placement
    where = prefills_on if prefills_on == decodes_on else f"{prefills_on} (prompts), {decodes_on} (answers)"
    name = engine.bundle.path.resolve().name.removesuffix(".krasis")
    return (
        f"{name}: {spec.family}, {len(spec.layers)} layers of "
        f"{count} experts; context {engine.context:,} tokens; runs on {where}"
    )


def memory_note(engine: Engine) -> str:
    """What keeps memory from being read at full speed, and the remedy; empty if nothing is known."""
    share = engine.huge_page_share
    if share is None or share >= ENOUGH_HUGE:
        return ""
    if engine.settings.reread:
        remedy = "XFS keeps files in huge pages, and so does ext4 from Linux 6.16"
    else:
        remedy = "--reread takes them from the disk anew (it helps on XFS, and on ext4 from Linux 6.16)"
    return (
        f"{share:.0%} of the weights lie in huge pages: memory is read slower than this machine can; {remedy}"
    )


def json_report(
    engine: Engine, stats: Generation, sampling: SamplingSettings, max_tokens: int | None
) -> dict[str, Any]:
    """Text, counts, seconds, rates and settings of one answer."""
    return {
        "krasis_run": JSON_VERSION,
        "text": stats.text,
        "reasoning": stats.reasoning,
        "tokens": stats.tokens,
        "stop_reason": stats.stop_reason,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_cached_tokens": stats.num_cached_tokens,
        "num_tokens": len(stats.tokens),
        "num_drafted_tokens": stats.drafts.num_drafted,
        "num_accepted_tokens": stats.drafts.num_accepted,
        "load_s": engine.load_s,
        "huge_page_share": engine.huge_page_share,
        "prefill_s": stats.prefill_s,
        "time_to_first_token_s": stats.time_to_first_token_s,
        "decode_s": stats.decode_s,
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "prefilled_on": engine.placement[0],
        "decoded_on": engine.placement[1],
        "settings": {
            "bundle": str(engine.bundle.path),
            **asdict(engine.settings),
            "context": engine.context,
            "prefill_chunk": engine.prefill_chunk,
            **asdict(sampling),
            "max_tokens": max_tokens,
        },
    }
