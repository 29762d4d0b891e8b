"""Which tokens end an answer: those that a model's files name, and the one its chat template ends turns with.

Fine-tunes of base models are often published with the base model's end token only; their answers would run on
through the next turns. As in llama.cpp, a token that is spelled like an end of turn ends a chat's answer,
named or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown

if TYPE_CHECKING:
    from krasis.runtime.text.chat import ChatTemplate
    from krasis.runtime.text.tokenizer import Tokenizer

# llama.cpp's list (src/llama-vocab.cpp, special_eog_ids) and the ends of a few more families.
SPELLINGS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<|flush|>", "<|calls|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "</s>", "[e~["),
    *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|END_OF_TURN_TOKEN|>", "<|eot|>", "<|end_of_turn|>"),
)
# In these formats <|end|> parts an answer's thinking from its text: tokens that only they have beside it.
_END_INSIDE = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})
_PART_END = "<|end|>"
_SIGNS = "".join(chr(code) for code in range(0xFDD0, 0xFDF0))
# What the trial conversation says: text that no template treats as anything else.
_QUESTION, _ANSWER = "Krasis1question", "Krasis2answer"


@dataclass(frozen=True, slots=True)
class NamedEnds:
    """What one file says: a value of ``eos_token_id`` or ``eos_token``.

    is_doubtful: another file names ends as well, which the makers of chat models keep better: of this one
    only ids of added tokens count. A config.json often has the id of another vocabulary, left over.
    """

    where: str
    value: object
    is_doubtful: bool = False


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Ends of a chat's answers. ids: all of them. added: the spellings of those that no file names.

    turn_end: the one of these that ends the template's turns, empty if it is named.
    """

    ids: frozenset[int]
    added: tuple[str, ...] = ()
    turn_end: str = ""


def named_ends(files: Iterable[NamedEnds], tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """(ids that the files name, a sentence for each value that was read otherwise than written).

    Raises FormatError for a value that can be no token.
    """
    notes: list[str] = []
    named: set[int] = set()
    for file in files:
        named.update(_read_ids(file, tokenizer, notes))
    return frozenset(named), tuple(notes)


def chat_ends(named: frozenset[int], tokenizer: Tokenizer, template: ChatTemplate) -> EndTokens:
    """The named ones, the token that the template ends turns with, and those that are spelled like it."""
    closing = turn_end(template, tokenizer, named)
    added: dict[str, int] = {}
    for text in dict.fromkeys([closing, *_spelled(tokenizer)]):
        number = tokenizer.token_id(text)
        if number is not None and number < tokenizer.vocab_size and number not in named:
            added[text] = number
    return EndTokens(
        ids=named | frozenset(added.values()),
        added=tuple(added),
        turn_end=closing if closing in added else "",
    )


def added_note(ends: EndTokens) -> str:
    """The sentence about ends that no file names; empty without any."""
    if not ends.added:
        return ""
    names = ", ".join(ends.added)
    if ends.turn_end:
        return (
            f"answers of a chat end at {names} too: the chat template ends turns with {ends.turn_end}, "
            "which the model's files do not name as an end"
        )
    return (
        f"answers of a chat end at {names} too: ends of turns are spelled so, though the model's files do "
        "not name them"
    )


def _spelled(tokenizer: Tokenizer) -> list[str]:
    """The spellings that the vocabulary has as single tokens.

    A token that was not added to the vocabulary but learnt from text may be text: ``</s>`` ends a passage
    that is struck out. Only spellings that no text has count then.
    """
    added = tokenizer.added_tokens()
    found = {text for text in SPELLINGS if text in added}
    found |= {text for text in SPELLINGS if text.startswith("<|") and tokenizer.token_id(text) is not None}
    if any(tokens <= found for tokens in _END_INSIDE):
        found.discard(_PART_END)
    return [text for text in SPELLINGS if text in found]


def turn_end(template: ChatTemplate, tokenizer: Tokenizer, named: Collection[int] = ()) -> str:
    """The special token that the template writes behind an assistant's turn.

    Empty if there is none, or more than one that could be it; if one that is named (ids) comes before the
    next turn's text: then the files know how turns end; or if the template refuses the trial conversation.
    """
    from krasis.runtime.text.chat import Message

    turns = [
        Message("user", _QUESTION),
        Message("assistant", _ANSWER),
        Message("user", _QUESTION),
    ]
    try:
        text = template.render(turns, add_generation_prompt=False)
    except FormatError:
        return ""
    _, found, tail = text.rpartition(_ANSWER)
    tail = tail.partition(_QUESTION)[0].lstrip()
    if not found or not tail:
        return ""
    specials = tokenizer.special_tokens()
    if any(text and number in named and text in tail for text, number in specials.items()):
        return ""
    first = max((text for text in specials if text and tail.startswith(text)), key=len, default="")
    if first and tail.count(first) > 1:
        return ""  # it ends parts of a turn as well, such as its thinking
    if first == _PART_END and any(set(specials) >= tokens for tokens in _END_INSIDE):
        return ""
    return first


def _read_ids(file: NamedEnds, tokenizer: Tokenizer, notes: list[str]) -> Iterable[int]:
    """The ids of one value: an id, a token's text, an id as text, or a list of such; null is none."""
    added = set(tokenizer.added_tokens().values()) if file.is_doubtful else set()
    values: Sequence[object] = file.value if isinstance(file.value, list) else [file.value]
    for value in values:
        if isinstance(value, Mapping):  # {"content": "</s>", ...}, a token of tokenizer_config.json
            value = value.get("content")  # noqa: PLW2901
        if value is None or value == "":
            continue
        number = _as_id(value, tokenizer)
        if number is None:
            if isinstance(value, str):
                notes.append(f"{file.where}: the end token {shown(value)} is not in the vocabulary")
                continue
            raise FormatError("the end token is no token", where=file.where, got=shown(value))
        if not 0 <= number < tokenizer.vocab_size:
            if number != -1:
                notes.append(
                    f"{file.where}: the end token {number} is outside the vocabulary of "
                    f"{tokenizer.vocab_size} and is ignored"
                )
            continue
        if file.is_doubtful and number not in added:
            notes.append(f"{file.where}: the end token {number} is an ordinary token and is ignored")
            continue
        yield number


def _as_id(value: object, tokenizer: Tokenizer) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str):
        return None
    found = tokenizer.token_id(value)
    if found is None and value.strip().lstrip("-").isdecimal() and len(value) < 20:
        return int(value)
    return found


def eos_values(config: Mapping[str, Any]) -> list[object]:
    """``eos_token_id`` of a config.json: its own, and that of the language model inside it."""
    inner = config.get("text_config")
    return [config.get("eos_token_id"), inner.get("eos_token_id") if isinstance(inner, Mapping) else None]


@dataclass(frozen=True, slots=True)
class Stops:
    """Stops as the decode loop meets them. texts: found in text. ids: special tokens, met by id.

    signs: id -> the sign that stands for a special token inside a longer stop text. A sign is a noncharacter
    of Unicode, never shown. names: id -> text of all these special tokens.
    """

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()
    signs: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)


def read_stops(stops: Sequence[str], tokenizer: Tokenizer, visible: Collection[int] = ()) -> Stops:
    """Stops of a caller. visible: ids of special tokens whose text is seen anyway.

    The text of a special token never appears, so one that is a stop, or in it, is met by id.
    Raises UsageError for stops with more different special tokens than there are signs.
    """
    if not stops:
        return Stops()
    specials = {text: number for text, number in tokenizer.special_tokens().items() if text}
    texts: list[str] = []
    ids: set[int] = set()
    signs: dict[int, str] = {}
    for stop in stops:
        alone = specials.get(stop.strip())
        if alone is not None:
            ids.add(alone)
        texts.append(stop)
        inside = [text for text in specials if text in stop and specials[text] not in visible]
        marked = stop
        for text in sorted(inside, key=len, reverse=True) if alone is None else []:
            if len(signs) == len(_SIGNS):
                raise UsageError("too many special tokens in stop texts", limit=len(_SIGNS))
            sign = signs.setdefault(specials[text], _SIGNS[len(signs)])
            marked = marked.replace(text, sign)
        if marked != stop:
            texts.append(marked)
    names = {number: text for text, number in specials.items() if number in ids or number in signs}
    return Stops(tuple(texts), frozenset(ids), signs, names)
