"""Parts a model's thinking from its answer, as text arrives.

Models think between markers such as ``<think>`` and ``</think>``. Often the prompt has opened the thinking
already, so an answer begins inside it; a marker may arrive in several pieces; and some models' markers are
special tokens, whose text decoding leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from krasis.runtime.text.tokenizer import Tokenizer, TokenStream

ANSWER, REASONING = "answer", "reasoning"
TAIL_TOKENS = 24  # of the prompt that are looked at for a marker at its end


@dataclass(frozen=True, slots=True)
class Format:
    """How one family marks its thinking. closes: any of them ends it. skips: texts that are neither thinking
    nor answer. tokens: what a vocabulary with this format has; none: what opens it. anywhere: also behind
    text of the answer; only for markers no text can contain by itself. wraps: what stands around an answer
    behind thinking, for templates that have both words of it."""

    opens: str
    closes: tuple[str, ...]
    skips: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    anywhere: bool = False
    wraps: tuple[str, str] | None = None


class Segment(NamedTuple):
    """A part of what a model wrote. kind: ``answer`` or ``reasoning``."""

    kind: str
    text: str


_THINK = Format("<think>", ("</think>",))
_FORMATS = (
    _THINK,
    Format("<think>", ("</think>",), ("<answer>",), wraps=("<answer>", "</answer>")),  # Hunyuan-A13B
    Format("<think>", ("</think>",), ("<response>",), wraps=("<response>", "</response>")),  # ERNIE 4.5
    Format("<thinking>", ("</thinking>",)),
    Format("<thought>", ("</thought>",)),
    Format("<reasoning>", ("</reasoning>",)),
    Format("<seed:think>", ("</seed:think>",)),
    Format("<mm:think>", ("</mm:think>",)),
    Format("<think:opensource>", ("</think:opensource>",)),
    Format("<ifm|think>", ("</ifm|think>",)),
    Format("\u25c1think\u25b7", ("\u25c1/think\u25b7",)),
    Format("<|begin_of_thought|>", ("<|end_of_thought|>",), ("<|begin_of_solution|>", "<|end_of_solution|>")),
    Format("Here is my thought process:", ("Here is my response:",)),
    Format("Here are my reasoning steps:", ("[BEGIN FINAL RESPONSE]",), ("[END FINAL RESPONSE]",)),
    Format("<|inner_prefix|>", ("<|inner_suffix|>",), anywhere=True),
    Format("[THINK]", ("[/THINK]",), anywhere=True),
    Format(
        "<|START_THINKING|>",
        ("<|END_THINKING|>",),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        anywhere=True,
    ),
    Format("<|channel>thought", ("<channel|>",), tokens=("<|channel>", "<channel|>"), anywhere=True),
    Format(
        "<|channel|>analysis<|message|>",
        ("<|end|>", "<|channel|>final<|message|>"),
        ("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
        tokens=("<|channel|>", "<|message|>"),
        anywhere=True,
    ),
    Format(
        "<|open|>think<|sep|>",
        ("<|close|>think<|sep|>",),
        ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        tokens=("<|open|>", "<|close|>", "<|sep|>"),
        anywhere=True,
    ),
    Format(
        "<|think|>",
        ("<|end|>",),
        ("<|begin|>assistant", "<|content|>"),
        tokens=("<|think|>", "<|content|>"),
        anywhere=True,
    ),
)


def find_formats(source: str, tokenizer: Tokenizer) -> tuple[Format, ...]:
    """The formats that a template (its text) or a vocabulary knows. ``<think>`` always counts: fine-tunes
    think so without a word in their templates."""
    specials = tokenizer.special_tokens()

    def is_known(one: Format) -> bool:
        if one.wraps is not None:
            return one.opens in source and all(word in source for word in one.wraps)
        tokens = one.tokens or (one.opens,)
        if all(tokenizer.token_id(token) is not None for token in tokens):
            return True
        return one.opens in source or (not one.anywhere and one.closes[0] in source)

    def is_possible(one: Format) -> bool:
        # A marker that no text contains by itself is made of special tokens, or it is no marker here.
        return not one.anywhere or any(token in one.opens for token in specials if token)

    return tuple(one for one in _FORMATS if one is _THINK or (is_known(one) and is_possible(one)))


def _specials_in(one: Format, specials: dict[str, int]) -> dict[int, str]:
    texts = (one.opens, *one.closes, *one.skips)
    return {number: text for text, number in specials.items() if text and any(text in t for t in texts)}


def marker_tokens(formats: Iterable[Format], tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> text of the special tokens that markers are made of."""
    specials = tokenizer.special_tokens()
    found: dict[int, str] = {}
    for one in formats:
        found |= _specials_in(one, specials)
    return found


def opened_by(prompt: Sequence[int], formats: Iterable[Format], tokenizer: Tokenizer) -> Format | None:
    """The format whose thinking the end of a prompt has opened."""
    tail = tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special=False).rstrip()
    return next((one for one in formats if tail.endswith(one.opens)), None)


class MarkedStream:
    """A token stream that shows the text of marker tokens, which decoding leaves out."""

    __slots__ = ("_markers", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, markers: dict[int, str]) -> None:
        self._tokenizer = tokenizer
        self._markers = markers
        self._stream: TokenStream = tokenizer.stream()

    def push(self, token: int) -> str:
        """As ``TokenStream.push``."""
        marker = self._markers.get(token)
        if marker is None:
            return self._stream.push(token)
        before = self._stream.finish()
        self._stream = self._tokenizer.stream()
        return before + marker

    def finish(self) -> str:
        """As ``TokenStream.finish``."""
        return self._stream.finish()


class ThinkingSplitter:
    """Takes text in pieces and gives segments. Without formats everything is answer, as it comes.

    opened: the format whose thinking the prompt has opened. Blanks around the thinking belong to neither
    part.
    """

    __slots__ = (
        *("_after", "_begun", "_blank", "_ends", "_everywhere", "_formats", "_held", "_inside", "_starts"),
    )

    def __init__(self, formats: Sequence[Format] = (), opened: Format | None = None) -> None:
        self._formats = tuple(formats)
        self._starts = _outside_markers(formats)
        self._everywhere = _outside_markers(one for one in formats if one.anywhere)
        self._ends = tuple(one.wraps[1] for one in formats if one.wraps is not None)
        self._inside = opened
        self._held = ""  # what may be the beginning of a marker, or blanks in front of one
        self._blank = ""  # blanks of the thinking, shown only if more of it follows
        self._begun = False  # whether the part that is being written has text
        self._after = False  # whether thinking came before this part

    @property
    def kind(self) -> str:
        """What is being written now."""
        return REASONING if self._inside is not None else ANSWER

    def push(self, text: str) -> list[Segment]:
        """The segments that became certain."""
        if not self._formats:
            return [Segment(ANSWER, text)] if text else []
        self._held += text
        segments: list[Segment] = []
        goes_on = True
        while self._held and goes_on:
            step = self._step_outside if self._inside is None else self._step_inside
            goes_on = step(segments)
        return segments

    def finish(self) -> list[Segment]:
        """What was held back: no marker came of it."""
        segments: list[Segment] = []
        is_end = self._inside is None and self._after and self._held.strip() in self._ends
        self._show(0 if is_end else len(self._held), segments)
        self._held = self._blank = ""
        return segments

    def _step_inside(self, segments: list[Segment]) -> bool:
        """Takes thinking off what is held, to the end of it or as far as is certain; True to go on."""
        closes: tuple[str, ...] = ()
        if self._inside is not None:
            closes = self._inside.closes
            if not self._begun:  # some models open once more what the prompt has opened
                rest, opens = self._held.lstrip(), self._inside.opens
                if rest.startswith(opens):
                    self._held = rest[len(opens) :]
                    return True
                if opens.startswith(rest):
                    return False
        if self._show_to_marker(closes, segments) is None:
            return False
        self._inside, self._begun, self._after, self._blank = None, False, True, ""
        return True

    def _step_outside(self, segments: list[Segment]) -> bool:
        """Takes answer off what is held, to the next marker or as far as is certain; True to go on."""
        if not self._begun:
            rest = self._held.lstrip()
            marker = max((one for one in self._starts if rest.startswith(one)), key=len, default=None)
            if marker is not None:
                self._held = rest[len(marker) :]
                self._pass(marker)
                return True
            if any(one.startswith(rest) for one in self._starts):  # nothing but blanks among them
                return False
        marker = self._show_to_marker(self._everywhere, segments)
        if marker is not None:
            self._pass(marker)
        return marker is not None

    def _pass(self, marker: str) -> None:
        """The state behind a marker outside of thinking."""
        opened = next((one for one in self._formats if one.opens == marker), None)
        if opened is not None:
            self._inside, self._begun = opened, False
        elif not self._begun:
            self._after = True  # an end of thinking that nothing opened, or what stands before an answer

    def _show_to_marker(self, markers: tuple[str, ...], segments: list[Segment]) -> str | None:
        """Shows what is held up to the first marker and takes both away; None, and all that cannot begin a
        marker, if there is none."""
        found = [(at, -len(one), one) for one in markers if (at := self._held.find(one)) >= 0]
        if not found:
            keep = max((_overlap(self._held, one) for one in markers), default=0)
            if self._inside is None and self._after:
                keep = max([keep, *(_end_size(self._held, one) for one in self._ends)])
            self._show(len(self._held) - keep, segments)
            return None
        at, _, marker = min(found)
        self._show(at, segments)
        self._held = self._held[len(marker) :]
        return marker

    def _show(self, size: int, segments: list[Segment]) -> None:
        """Moves so many held characters into segments, without the blanks around thinking."""
        text, self._held = self._blank + self._held[:size], self._held[size:]
        self._blank = ""
        if not self._begun and (self._inside is not None or self._after):
            text = text.lstrip()
        if self._inside is not None:
            bare = text.rstrip()
            self._blank, text = text[len(bare) :], bare
        if text:
            self._begun = True
            segments.append(Segment(self.kind, text))


def _outside_markers(formats: Iterable[Format]) -> tuple[str, ...]:
    """What may come outside of thinking."""
    return tuple(dict.fromkeys(text for one in formats for text in (one.opens, *one.closes, *one.skips)))


def _end_size(text: str, end: str) -> int:
    """How much at the end of text may be the end of an answer, with the blanks around it."""
    bare = text.rstrip()
    size = len(end) if bare.endswith(end) else _overlap(text, end) - (len(text) - len(bare))
    return len(text) - len(bare[: len(bare) - max(size, 0)].rstrip())


def _overlap(text: str, marker: str) -> int:
    """The longest end of text that begins marker."""
    return next(
        (size for size in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-size:])), 0
    )
