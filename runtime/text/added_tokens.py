"""Joins the tokens that stand beside tokenizer.json (tokenizer_config.json, special_tokens_map.json,
added_tokens.json) to those in it, as transformers does.

A token that transformers would give a number beyond the model's rows is left out: the model cannot read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import FormatError
from krasis.formats.names import shown

if TYPE_CHECKING:
    import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKENS = 1 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Classes that rebuild the tokenizer by their own rule and make every special token a plain special one.
_PLAIN_SPECIAL = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    """A token as a file beside tokenizer.json names it. number: its id, None where none is said. flags: those
    of tokenizers.AddedToken that are said."""

    content: str
    number: int | None
    flags: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class DeclaredTokens:
    """All of them, in the order in which they are added.

    special: contents that are special tokens by name. config: tokenizer_config.json with what
    special_tokens_map.json changes in it. splits_special: special tokens in a text are ordinary text.
    """

    tokens: tuple[DeclaredToken, ...]
    special: frozenset[str]
    config: Mapping[str, Any]
    splits_special: bool
    resets_flags: bool

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes, for another process; without the config."""
        return {
            "tokens": [[token.content, token.number, dict(token.flags)] for token in self.tokens],
            "special": sorted(self.special),
            "splits_special": self.splits_special,
            "resets_flags": self.resets_flags,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DeclaredTokens:
        """The tokens that ``to_json`` wrote."""
        return cls(
            tokens=tuple(DeclaredToken(*token) for token in record["tokens"]),
            special=frozenset(record["special"]),
            config={},
            splits_special=record["splits_special"],
            resets_flags=record["resets_flags"],
        )


def read_declared(
    config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any], where: str
) -> DeclaredTokens:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say; empty for none.

    Raises FormatError for something that is no token.
    """
    declared = config.get("added_tokens_decoder")
    tokens: list[DeclaredToken] = []
    if declared is not None:
        if not isinstance(declared, dict) or len(declared) > MAX_TOKENS:
            raise FormatError("added_tokens_decoder must be an object", where=where, got=shown(declared))
        tokens = [_declared(number, token, where) for number, token in declared.items()]
        tokens.sort(key=lambda token: token.number or 0)
    else:
        config = {**config, **special_map}
    special = _special(config, where)
    if declared is None:
        for content, number in added.items():
            if type(number) is not int or number < 0:
                raise FormatError("not the id of a token", where=f"{where}: added_tokens", got=shown(number))
            is_special = content in special
            flags = {"special": is_special, "normalized": not is_special}
            tokens.append(DeclaredToken(content, number, flags))
        tokens.sort(key=lambda token: token.number or 0)
    known = {token.content for token in tokens}
    tokens += [
        DeclaredToken(content, None, {**flags, "special": True})
        for content, flags in special.items()
        if content not in known
    ]
    return DeclaredTokens(
        tokens=tuple(token for token in tokens if token.content),
        special=frozenset(special),
        config=config,
        splits_special=config.get("split_special_tokens") is True,
        resets_flags=config.get("tokenizer_class") in _PLAIN_SPECIAL,
    )


def token_text(value: object) -> str | None:
    """A token of tokenizer_config.json: text, or an object with ``content``; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _declared(number: object, token: object, where: str) -> DeclaredToken:
    where = f"{where}: added_tokens_decoder"
    if not isinstance(number, str) or not number.isascii() or not number.isdigit() or len(number) > 9:
        raise FormatError("not the id of a token", where=where, got=shown(number))
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str):
        raise FormatError("a token must be an object with its content", where=where, got=shown(token))
    return DeclaredToken(content, int(number), _flags(token, where))


def _flags(token: object, where: str) -> dict[str, bool]:
    flags = {name: token[name] for name in _FLAGS if name in token} if isinstance(token, dict) else {}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise FormatError(f"{name} of a token must be true or false", where=where, got=shown(value))
    return flags


def _special(config: Mapping[str, Any], where: str) -> dict[str, dict[str, bool]]:
    """Content -> flags of every token that is special by its name, in order."""
    named = [config.get(name) for name in SPECIAL_NAMES]
    named += [
        value for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)
    ]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(more, list | dict):
        raise FormatError("additional_special_tokens must be a list", where=where, got=shown(more))
    named += list(more.values()) if isinstance(more, dict) else more
    found: dict[str, dict[str, bool]] = {}
    for value in named:
        content = token_text(value)
        if content:
            found.setdefault(content, _flags(value, where))
    return found


def join_tokens(
    library: tokenizers.Tokenizer, data: bytes, declared: DeclaredTokens, num_rows: int
) -> tuple[tokenizers.Tokenizer, list[str]]:
    """The tokenizer with the declared tokens in it, and a sentence for each one that did not fit.

    data: tokenizer.json, for the case that ids have to be put right. num_rows: of the model's embedding.
    """
    if any(
        token.number is not None and library.token_to_id(token.content) not in (None, token.number)
        for token in declared.tokens
    ) or _leaves_gaps(library, declared, num_rows):
        library = _renumbered(library, data, declared, num_rows)
    notes = _add(library, declared, num_rows)
    library.encode_special_tokens = declared.splits_special
    return library, notes


def _next_id(library: tokenizers.Tokenizer) -> int:
    """The number that the library gives the next token that it does not know."""
    return max(library.get_vocab_size(with_added_tokens=False), max(_added(library), default=-1) + 1)


def _added(library: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    return library.get_added_tokens_decoder()


def _leaves_gaps(library: tokenizers.Tokenizer, declared: DeclaredTokens, num_rows: int) -> bool:
    """Whether a new token's number is not the one that the library would give it."""
    following = _next_id(library)
    for token in declared.tokens:
        if library.token_to_id(token.content) is not None:
            continue
        if token.number is not None and following != token.number < num_rows:
            return True
        following += 1
    return False


def _renumbered(
    library: tokenizers.Tokenizer, data: bytes, declared: DeclaredTokens, num_rows: int
) -> tokenizers.Tokenizer:
    """The library numbers added tokens one after the other, whatever the files say, unless the vocabulary
    itself holds them: so they are written into it. Where that cannot be, the library's numbers stay."""
    from tokenizers import Tokenizer as Library

    record = json.loads(data)
    vocabulary = record.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return library
    taken = {number: token for token, number in vocabulary.items()}
    said = [(one["content"], one["id"]) for one in record.get("added_tokens") or []]
    said += [(token.content, token.number) for token in declared.tokens if token.number is not None]
    for content, number in said:
        if content not in vocabulary and number not in taken and number < num_rows:
            vocabulary[content] = number
            taken[number] = content
    return Library.from_str(json.dumps(record))


def _add(library: tokenizers.Tokenizer, declared: DeclaredTokens, num_rows: int) -> list[str]:
    from tokenizers import AddedToken

    notes: list[str] = []
    batch: list[tokenizers.AddedToken] = []  # added at once: the library builds its tables anew each time
    present, following = _added(library), _next_id(library)
    for token in declared.tokens:
        number = library.token_to_id(token.content)
        if number is None and max(following, token.number or 0) >= num_rows:
            beyond = f"its number is beyond the model's {num_rows} rows"
            notes.append(f"{shown(token.content)} is left out: {beyond}")
            continue
        held = present.get(number) if number is not None else None
        # A token that is only named keeps what is known of it.
        added = held if held is not None and token.number is None else _library_token(AddedToken, token)
        if token.content in declared.special:
            added = _special_form(added, resets=declared.resets_flags)
        if held is None or repr(added) != repr(held):
            batch.append(added)
        if number is None:
            number, following = following, following + 1
        if token.number is not None and number != token.number:
            notes.append(f"{shown(token.content)} is {number}, although it is named as {token.number}")
    library.add_tokens(batch)
    return notes


def _library_token(kind: type[tokenizers.AddedToken], token: DeclaredToken) -> tokenizers.AddedToken:
    return kind(token.content, **{name: token.flags[name] for name in _FLAGS if name in token.flags})


def _special_form(token: tokenizers.AddedToken, *, resets: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if resets:
        return AddedToken(token.content, special=True)
    if token.special:
        return token
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
