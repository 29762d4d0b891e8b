"""A tokenizer whose tokens are letters, the ends of its texts, and what is read out of a request's events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from krasis.runtime.serving.api import Delta, Request
from krasis.runtime.text.end_tokens import Stops
from krasis.runtime.text.ends import TextEnds
from krasis.runtime.text.thinking import ThinkingSplitter
from krasis.runtime.text.tokenizer import TokenStream

END = 63


class Letters:
    """Id -> letter."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(ord("A") + number) for number in ids)


def ends(request: Request) -> TextEnds:
    """END ends an answer."""
    stream: Any = TokenStream(Letters())  # type: ignore[arg-type]
    return TextEnds(frozenset({END}), Stops(request.stops), stream, ThinkingSplitter())


def text_of(events: Sequence[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def tokens_of(events: Sequence[object]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]
