"""The text side of a bundle: tokenizer, chat template, end tokens and suggested sampling, each read when
first used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from krasis.formats.bundle_reader import Bundle
from krasis.formats.errors import FormatError
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.chat import ChatTemplate
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.tokenizer import Tokenizer, missing_tokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 16 * 2**20
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TextAssets:
    """What a bundle says about text. The bundle must stay open until the properties needed were read."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._where = str(bundle.path)
        self._names = {asset.name for asset in bundle.manifest.assets}
        self._vocab_size = bundle.architecture.vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedModelError if the bundle has none, FormatError if it is damaged."""
        if TOKENIZER not in self._names:
            raise missing_tokenizer(self._where)
        where = f"{self._where}: {TOKENIZER}"
        return Tokenizer(self._bundle.asset(TOKENIZER), self._vocab_size, where)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, None if the bundle has none."""
        source = self._template_source()
        if source is None:
            return None
        tokens = {name: text for name in _TEMPLATE_TOKENS if (text := _token_text(self._tokens.get(name)))}
        return ChatTemplate(source, tokens, f"{self._where}: chat template")

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end an answer: of generation_config.json, and the tokenizer's end token."""
        ids = self._generation.get("eos_token_id")
        found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if not all(isinstance(one, int) and 0 <= one < self._vocab_size for one in found):
            raise FormatError(
                "eos_token_id is no token", where=f"{self._where}: {GENERATION_CONFIG}", got=ids
            )
        text = _token_text(self._tokens.get("eos_token"))
        if text and (named := self.tokenizer.token_id(text)) is not None:
            found.add(named)
        return frozenset(found)

    @cached_property
    def sampling(self) -> SamplingSettings:
        """The sampling that generation_config.json suggests; greedy without one."""
        return SamplingSettings.from_generation_config(
            self._generation, f"{self._where}: {GENERATION_CONFIG}"
        )

    @cached_property
    def _tokens(self) -> Mapping[str, Any]:
        return self._json_object(TOKENIZER_CONFIG)

    @cached_property
    def _generation(self) -> Mapping[str, Any]:
        return self._json_object(GENERATION_CONFIG)

    def _template_source(self) -> str | None:
        if TEMPLATE_FILE in self._names:
            return self._text(TEMPLATE_FILE)
        source = self._tokens.get("chat_template")
        if isinstance(source, list):
            # Several named templates: {"name": ..., "template": ...}.
            named = {str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)}
            source = named.get("default")
        if source is not None and not isinstance(source, str):
            raise FormatError(
                "chat_template must be text", where=f"{self._where}: {TOKENIZER_CONFIG}", got=source
            )
        return source or None

    def _text(self, name: str) -> str:
        try:
            return self._bundle.asset(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                "the file is not UTF-8 text", where=f"{self._where}: {name}", got=error
            ) from error

    def _json_object(self, name: str) -> Mapping[str, Any]:
        if name not in self._names:
            return {}
        return parse_json_object(
            self._bundle.asset(name), f"{self._where}: {name}", max_bytes=MAX_CONFIG_BYTES
        )


def _token_text(value: object) -> str | None:
    """A token of tokenizer_config.json: text, or an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
