"""The text side of a bundle: tokenizer, chat template, end tokens and suggested sampling, each read when
first used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from krasis.formats.bundle_reader import Bundle
from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.chat import ChatTemplate
from krasis.runtime.early import Early
from krasis.runtime.end_tokens import (
    EndTokens,
    NamedEnds,
    added_note,
    chat_ends,
    eos_values,
    named_ends,
)
from krasis.runtime.generation_defaults import GenerationDefaults, describe, read_defaults
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.template_variables import Variables, unused_note
from krasis.runtime.thinking import Format, find_formats, marker_tokens
from krasis.runtime.tokenizer import Tokenizer, missing_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
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
        self._noted: set[str] = set()
        self._early: Early[Tokenizer] | None = None

    def prepare(self) -> None:
        """Begins to load the tokenizer, beside what else it takes to open a bundle. Whatever is wrong with it
        is said when it is asked for: who runs token ids needs none."""
        if TOKENIZER not in self._names or self._early is not None:
            return
        where = f"{self._where}: {TOKENIZER}"
        try:
            data = self._bundle.asset(TOKENIZER)
        except KrasisError as error:
            logger.info("%s cannot be read: %s", where, error)
            return
        self._early = Early(lambda: Tokenizer(data, self._vocab_size, where))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedModelError if the bundle has none, FormatError if it is damaged."""
        if TOKENIZER not in self._names:
            raise missing_tokenizer(self._where)
        if self._early is not None:
            return self._early.result()
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
    def named_ends(self) -> frozenset[int]:
        """Ids that the files name as ends: generation_config.json, config.json, and the tokenizer's end
        token."""
        named = self._generation.get("eos_token_id")
        files = [NamedEnds(f"{self._where}: {GENERATION_CONFIG}", named)]
        files += [
            NamedEnds(f"{self._where}: {MODEL_CONFIG}", value, is_doubtful=named is not None)
            for value in eos_values(self._model_config)
        ]
        files.append(NamedEnds(f"{self._where}: {TOKENIZER_CONFIG}", self._tokens.get("eos_token")))
        ids, notes = named_ends(files, self.tokenizer)
        for note in notes:
            logger.warning("%s", note)
        return ids

    @cached_property
    def end_tokens(self) -> EndTokens:
        """What ends a chat's answers: the named ends, and those that the template ends turns with."""
        if self.template is None:
            return EndTokens(self.named_ends)
        found = chat_ends(self.named_ends, self.tokenizer, self.template)
        if note := added_note(found):
            logger.info("%s", note)
        return found

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """What generation_config.json recommends."""
        found = read_defaults(self._generation, f"{self._where}: {GENERATION_CONFIG}")
        for note in found.notes:
            logger.warning("%s", note)
        return found

    @property
    def sampling(self) -> SamplingSettings:
        """The sampling that generation_config.json suggests; greedy without one."""
        return self.defaults.sampling

    def note_sampling(self) -> None:
        """Logs what tokens are picked with where a caller does not say; a warning, once, if no file does."""
        if "sampling" not in self._noted:
            self._noted.add("sampling")
            how = describe(self.sampling)
            if self.defaults.recommended:
                logger.info("sampling as %s recommends: %s", GENERATION_CONFIG, how)
            else:
                logger.warning("%s: the model's files recommend no sampling: %s", self._where, how)

    @cached_property
    def thinking(self) -> tuple[Format, ...]:
        """How a chat's answers may mark their thinking; none without a template."""
        return () if self.template is None else find_formats(self.template.source, self.tokenizer)

    @cached_property
    def thinking_markers(self) -> dict[int, str]:
        """Id -> text of the special tokens that mark thinking."""
        return marker_tokens(self.thinking, self.tokenizer)

    def note_unused(self, variables: Variables) -> None:
        """Logs the names of variables that the template does not read, each once."""
        new = tuple(name for name in variables if f"variable {name}" not in self._noted)
        if new and self.template is not None:
            self._noted.update(f"variable {name}" for name in new)
            if note := unused_note(new, self.template.source):
                logger.warning("%s", note)

    @cached_property
    def _tokens(self) -> Mapping[str, Any]:
        return self._json_object(TOKENIZER_CONFIG)

    @cached_property
    def _model_config(self) -> Mapping[str, Any]:
        # Kept as a record, and of use here only for its end token: nothing else depends on it.
        try:
            return self._json_object(MODEL_CONFIG)
        except FormatError as error:
            logger.warning("its end token is not known: %s", error)
            return {}

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
