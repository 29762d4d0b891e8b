"""All that one generation needs to know about where its text ends and what in it is thinking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.end_tokens import Stops, read_stops
from krasis.runtime.text.thinking import MarkedStream, ThinkingSplitter, opened_by
from krasis.runtime.text.tokenizer import TokenStream


@dataclass(frozen=True, slots=True)
class TextEnds:
    """See ``generation.GenerationPlan``."""

    end_tokens: frozenset[int]
    stops: Stops
    stream: TokenStream | MarkedStream
    splitter: ThinkingSplitter


def ends_of_text(
    assets: TextAssets, prompt: Sequence[int], stop: str | Sequence[str], *, is_plain: bool, split: bool
) -> TextEnds:
    """The ends of what follows prompt (ids). is_plain: it continues a text and is no turn of a chat: only
    named tokens end it and nothing in it is thinking. split: whether thinking is parted from the answer.

    Raises UsageError for stops that cannot be met.
    """
    tokenizer = assets.tokenizer
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    is_plain = is_plain or assets.template is None
    markers = assets.markers if split and not is_plain else {}
    stops = read_stops(texts if is_plain else texts + assets.defaults.stops, tokenizer, markers)
    seen = {**stops.signs, **markers}
    stream = MarkedStream(tokenizer, seen) if seen else tokenizer.stream()
    ends = assets.named_ends if is_plain else assets.end_tokens.ids
    if is_plain or not split:
        return TextEnds(ends, stops, stream, ThinkingSplitter())
    opened = opened_by(prompt, assets.thinking, tokenizer)
    return TextEnds(ends, stops, stream, ThinkingSplitter(assets.thinking, opened))
