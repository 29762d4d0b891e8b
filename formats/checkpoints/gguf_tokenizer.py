"""Rebuilds Hugging Face tokenizer files from a GGUF's metadata, so that a GGUF converts without its original
checkpoint.

Only byte-level BPE with the splitting rules of Qwen2 and Qwen3, and of o200k (gpt-oss): a GGUF does not hold
the rule, it merely names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from krasis.formats.checkpoints.gguf_control import CONTROL, UNUSED, USER_DEFINED, corrected_types
from krasis.formats.checkpoints.gguf_sampling import sampling_config
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.names import shown
from krasis.formats.process.foreign import foreign_errors

# English contractions; words with at most one leading mark; single digits; punctuation; line ends; spaces.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LOWER, _UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Words begin anew at a capital after small letters and end with a contraction; up to three digits; as above.
_O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> rule
_SPLITS = {"qwen2": _QWEN2_SPLIT, "deepseek-r1-qwen": _QWEN2_SPLIT, "gpt-4o": _O200K_SPLIT}
_NOT_NORMALISED = (_O200K_SPLIT,)  # the others' text is brought into NFC first

_ROLES = ("bos", "eos", "eot", "eom", "padding")
_NO_TOKEN = 2**32 - 1  # what llama.cpp writes for a token that a vocabulary lacks


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What the metadata says, checked. tokens: by id; types: GGUF's kind of each token."""

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]

    @property
    def used(self) -> dict[str, int]:
        """token -> id without the rows that only pad the embedding."""
        return {token: number for number, token in enumerate(self.tokens) if self.types[number] != UNUSED}

    @property
    def added(self) -> list[int]:
        """Ids of tokens that are matched as a whole before any splitting."""
        return [number for number, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)]


def tokenizer_assets(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """File name -> contents of ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.

    metadata: of ``GgufCheckpoint``; where: the file, for messages. Raises UnsupportedModelError for another
    kind of tokenizer (it names the supported ones), FormatError for a vocabulary that contradicts itself.
    """
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise UnsupportedModelError(
            "the tokenizer of this GGUF cannot be rebuilt",
            where=f"{where}: tokenizer.ggml.pre",
            got=f"model {shown(kind)}, pre {shown(split)}",
            limit="model 'gpt2' with pre " + ", ".join(_SPLITS),
            hint="give the Hugging Face checkpoint too; its tokenizer is used then",
        )
    vocabulary = _read_vocabulary(metadata, where)
    bos, eos, pad = (_token_id(metadata, name, vocabulary, where) for name in ("bos", "eos", "padding"))
    is_bos_added = metadata.get("tokenizer.ggml.add_bos_token", False) is True and bos is not None
    with foreign_errors("the tokenizer cannot be rebuilt", f"{where}: tokenizer.ggml"):
        tokenizer = _build(vocabulary, _SPLITS[str(split)], bos if is_bos_added else None)
    # A name makes a token special. Some files give the role of a begin token to a comma.
    names = {
        key: None if number is None or number not in vocabulary.added else vocabulary.tokens[number]
        for key, number in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad))
    }
    config = {
        **names,
        "add_bos_token": is_bos_added,
        "added_tokens_decoder": {str(number): _added_json(vocabulary, number) for number in vocabulary.added},
        "chat_template": _chat_template(metadata, where),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json({key: value for key, value in config.items() if value is not None}),
        "generation_config.json": _json(_generation_config(metadata, vocabulary, where)),
    }


def _read_vocabulary(metadata: Mapping[str, Any], where: str) -> _Vocabulary:
    tokens = _list(metadata, "tokens", str, where)
    # Without types, as some old files are, every token is an ordinary one (1) unless its spelling says more.
    has_types = metadata.get("tokenizer.ggml.token_type") is not None
    types = _list(metadata, "token_type", int, where) if has_types else [1] * len(tokens)
    if len(types) != len(tokens):
        raise FormatError(
            "token types do not match the tokens",
            where=f"{where}: tokenizer.ggml.token_type",
            got=len(types),
            limit=len(tokens),
        )
    lines = _list(metadata, "merges", str, where)
    named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in _ROLES]
    roles = [number for number in named if type(number) is int]
    types = corrected_types(tokens, types, {_merged(line) for line in lines}, roles)
    merges: list[tuple[str, str]] = []
    vocabulary = _Vocabulary(tokens, types, merges)
    used = vocabulary.used
    if len(used) != sum(kind != UNUSED for kind in types):
        raise FormatError("a token occurs twice", where=f"{where}: tokenizer.ggml.tokens")
    for line in lines:
        # A token is never empty, so the space that parts the two cannot be the first character.
        at = line.find(" ", 1)
        left, right = line[:at], line[at + 1 :]
        if at < 0 or left not in used or right not in used or left + right not in used:
            raise FormatError(
                "merge does not fit the tokens", where=f"{where}: tokenizer.ggml.merges", got=shown(line)
            )
        merges.append((left, right))
    return vocabulary


def _merged(line: str) -> str:
    """What a merge makes: its two parts without the space between them."""
    at = line.find(" ", 1)
    return line[:at] + line[at + 1 :]


def _list(metadata: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise FormatError(
            f"metadata must be a list of {kind.__name__}",
            where=f"{where}: tokenizer.ggml.{name}",
            got=type(values).__name__,
        )
    return values


def _build(vocabulary: _Vocabulary, split: str, bos: int | None) -> Tokenizer:
    # Added tokens are in the model's vocabulary as well: that is what fixes their ids.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.used, merges=vocabulary.merges))
    if split not in _NOT_NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    processor: Any = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        name = vocabulary.tokens[bos]
        # In a template's pieces "$" begins a sequence and ":" a type: such a token needs another name there.
        alias = "begin" if ":" in name or name.startswith("$") else name
        special = {"id": alias, "ids": [bos], "tokens": [name]}
        first = processors.TemplateProcessing(
            single=[alias, "$A"], pair=[alias, "$A", "$B"], special_tokens=[special]
        )
        processor = processors.Sequence([processor, first])
    tokenizer.post_processor = processor
    for number in vocabulary.added:
        is_special = vocabulary.types[number] == CONTROL
        token = AddedToken(vocabulary.tokens[number], special=is_special, normalized=False)
        if is_special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    return tokenizer


def _added_json(vocabulary: _Vocabulary, number: int) -> dict[str, Any]:
    return {
        "content": vocabulary.tokens[number],
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": vocabulary.types[number] == CONTROL,
    }


def _token_id(metadata: Mapping[str, Any], name: str, vocabulary: _Vocabulary, where: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    number = metadata.get(key)
    if number is None or number == _NO_TOKEN:
        return None
    if type(number) is not int or not 0 <= number < len(vocabulary.tokens):
        raise FormatError(
            "not the id of a token",
            where=f"{where}: {key}",
            got=shown(number),
            limit=f"0..{len(vocabulary.tokens) - 1}",
        )
    return number


def _chat_template(metadata: Mapping[str, Any], where: str) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise FormatError(
            "metadata must be text", where=f"{where}: tokenizer.chat_template", got=shown(template)
        )
    return template


def _generation_config(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> dict[str, Any]:
    """What ends an answer, and the sampling that the model's makers recommend, as far as the file says."""
    ends = [_token_id(metadata, name, vocabulary, where) for name in ("eos", "eot", "eom")]
    config: dict[str, Any] = {}
    if unique := [number for number in dict.fromkeys(ends) if number is not None]:
        config["eos_token_id"] = unique
    return config | sampling_config(metadata, where)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
