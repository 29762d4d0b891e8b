"""Tokenizer, chat template and configs: copied from a checkpoint, or rebuilt from a GGUF's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from krasis.formats.errors import FormatError, ResourceError, UnsupportedModelError

# Copied as they are. config.json is a record only: the runtime reads the manifest's architecture.
HF_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",
)
MAX_ASSET_BYTES = 128 << 20

# How Qwen2 and Qwen3 split text before merging: contractions, words with one leading mark, single digits,
# punctuation, line ends, spaces. The GGUF only names it.
_SPLITS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # ggml token types


def assets_from_folder(folder: Path) -> dict[str, bytes]:
    """The text files of a checkpoint that exist. Raises FormatError for one beyond the bound."""
    found: dict[str, bytes] = {}
    for name in HF_ASSETS:
        path = folder / name
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > MAX_ASSET_BYTES:
                raise FormatError(
                    "text file is too large", where=str(path), got=path.stat().st_size, limit=MAX_ASSET_BYTES
                )
            found[name] = path.read_bytes()
        except OSError as error:
            raise ResourceError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return found


def assets_from_gguf(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json, its config, generation_config.json and the chat template, as far as a GGUF has them.

    Empty without a tokenizer. Raises UnsupportedModelError for a kind of tokenizer that cannot be rebuilt
    exactly.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        return {}
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise UnsupportedModelError(
            "the tokenizer of this GGUF cannot be rebuilt",
            where=where,
            got=f"model {kind!r}, pre {split!r}",
            limit="model 'gpt2', pre " + ", ".join(repr(name) for name in _SPLITS),
            hint="give the Hugging Face folder too: its tokenizer is used then",
        )
    assets = {
        "tokenizer.json": _tokenizer(tokens, metadata, _SPLITS[split], where).to_str().encode(),
        "tokenizer_config.json": _json(_tokenizer_config(tokens, metadata)),
        "generation_config.json": _json(_generation_config(metadata, tokens)),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        assets["chat_template.jinja"] = template.encode()
    return assets


def _tokenizer(tokens: list[str], metadata: Mapping[str, Any], split: str, where: str) -> Tokenizer:
    merges_text = metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(merges_text, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise FormatError("tokenizer without merges or token types", where=where)
    # Special tokens are in the vocabulary too: that keeps their ids. Padding rows of the embedding are no
    # tokens.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    added = [i for i in vocab.values() if types[i] in (_CONTROL, _USER_DEFINED)]
    pairs = [str(line).partition(" ") for line in merges_text]
    merges = [(left, right) for left, _, right in pairs]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        raise FormatError("the tokenizer's merges do not fit its tokens", where=where, got=error) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for i in added:
        special = types[i] == _CONTROL
        token = AddedToken(tokens[i], special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(tokens[i]) != i:
            raise FormatError("the tokenizer names a token twice", where=where, got=repr(tokens[i]))
    return tokenizer


def _token(tokens: list[str], metadata: Mapping[str, Any], key: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _tokenizer_config(tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": _token(tokens, metadata, "bos"),
        "eos_token": _token(tokens, metadata, "eos"),
        "pad_token": _token(tokens, metadata, "padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _generation_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    ends = []
    for key in ("eos", "eot", "eom"):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens) and number not in ends:
            ends.append(number)
    return {"eos_token_id": ends} if ends else {}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
