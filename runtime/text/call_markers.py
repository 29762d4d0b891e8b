"""The marks of calls of tools that are special tokens, whose text decoding would leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krasis.runtime.text.tokenizer import Tokenizer

_TAGS = ("tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value")
_DEEPSEEK = ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
CALL_MARKERS = frozenset(
    (
        *(f"<{end}{tag}{suffix}>" for tag in _TAGS for suffix in ("", ":opensource") for end in ("", "/")),
        *(f"<\uff5ctool\u2581{one}\uff5c>" for one in _DEEPSEEK),
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_call_start|>"),
        *("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_call|>", "<|START_ACTION|>", "<|END_ACTION|>"),
        *("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<TOOLCALL>", "</TOOLCALL>", "\uff5cDSML\uff5c"),
        *("<minimax:tool_call>", "</minimax:tool_call>", "]<]minimax[>["),
        *("<|python_start|>", "<|python_end|>", "<|python_tag|>", "<|function_call|>", "<|role_sep|>"),
    )
)


def call_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> text of those that the vocabulary has."""
    return {number: text for text, number in tokenizer.special_tokens().items() if text in CALL_MARKERS}
