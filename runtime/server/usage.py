"""Counts and times of an answer, as each API says them."""

from __future__ import annotations

from typing import Any

from krasis.formats.process.tool import tool_version
from krasis.runtime.server.turn import End, Making

FINGERPRINT = f"build-krasis-{tool_version()}"  # of what answers, as llama.cpp's begin


def openai_usage(end: End) -> dict[str, Any]:
    """Of chat and completions."""
    return {
        "prompt_tokens": end.num_prompt_tokens,
        "completion_tokens": end.num_generated_tokens,
        "total_tokens": end.num_prompt_tokens + end.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.num_cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": end.num_reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def responses_usage(end: End) -> dict[str, Any]:
    """Of responses."""
    return {
        "input_tokens": end.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": end.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": end.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": end.num_reasoning_tokens},
        "total_tokens": end.num_prompt_tokens + end.num_generated_tokens,
    }


def anthropic_usage(
    num_prompt_tokens: int, num_cached_tokens: int, num_generated_tokens: int
) -> dict[str, Any]:
    """Of messages: there, what was cached is not among the input tokens."""
    return {
        "input_tokens": num_prompt_tokens - num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": num_generated_tokens,
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
        "output_tokens_details": None,
        "iterations": None,
    }


def timings(end: End) -> dict[str, Any]:
    """llama.cpp's: its page and many scripts read them. Milliseconds. The pass over the prompt gives the
    first token; the rate of the others is of their steps alone."""
    computed = end.num_prompt_tokens - end.num_cached_tokens
    said = _timings(end.num_cached_tokens, computed, end.prefill_s, end.num_generated_tokens, end.decode_s)
    if end.num_drafted_tokens:  # as llama.cpp: else the fields are not there
        said |= {"draft_n": end.num_drafted_tokens, "draft_n_accepted": end.num_accepted_tokens}
    return said


def timings_while(making: Making) -> dict[str, Any]:
    """The same while the prompt is being computed."""
    one = making.progress
    computed = one.num_processed - one.num_cached
    return _timings(one.num_cached, computed, one.elapsed_s if computed else 0.0, 0, 0.0)


def _timings(
    num_cached: int, computed: int, prefill_s: float, num_generated: int, decode_s: float
) -> dict[str, Any]:
    steps = max(num_generated - 1, 0)
    prompt_ms, predicted_ms = 1e3 * prefill_s, 1e3 * decode_s
    return {
        "cache_n": num_cached,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(computed, 1),
        "prompt_per_second": 1e3 * computed / prompt_ms if prompt_ms > 0 else 0.0,
        "predicted_n": num_generated,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(steps, 1),
        "predicted_per_second": 1e3 * steps / predicted_ms if predicted_ms > 0 else 0.0,
    }
