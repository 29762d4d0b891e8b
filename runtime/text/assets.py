"""The text side of a bundle: tokenizer, chat template, end tokens and suggested sampling, each read when
first used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.plain_text import BYTE_ORDER_MARK, decode_file, what_it_is
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.early import Early
from krasis.runtime.generation_defaults import GenerationDefaults, describe, read_defaults
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.template_values import Variables
from krasis.runtime.text.added_tokens import SPECIAL_NAMES, DeclaredTokens, read_declared, token_text
from krasis.runtime.text.call_markers import call_markers
from krasis.runtime.text.chat import ChatTemplate
from krasis.runtime.text.end_tokens import (
    EndTokens,
    NamedEnds,
    added_note,
    chat_ends,
    eos_values,
    named_ends,
)
from krasis.runtime.text.template_variables import unused_note
from krasis.runtime.text.thinking import Format, find_formats, marker_tokens
from krasis.runtime.text.tokenizer import Tokenizer, missing_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MAX_CONFIG_BYTES = 16 * 2**20


class TextAssets:
    """What a bundle says about text. The bundle must stay open until the properties needed were read.

    template: a file (Jinja, or JSON with a chat_template) whose template takes the place of the bundle's; it
    is read at once. Raises FormatError or ResourceError if that cannot be read.
    """

    def __init__(self, bundle: Bundle, template: str | Path | None = None) -> None:
        names = {asset.name for asset in bundle.manifest.assets}
        self._begin(bundle.asset, names, str(bundle.path), bundle.spec.vocab)
        self._given = None if template is None else read_template(Path(template))
        if template is not None:
            self._template_where = str(template)

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], where: str, vocab_size: int) -> TextAssets:
        """The same of text files that are in no bundle yet. where: the folder, for messages."""
        self = cls.__new__(cls)
        self._begin(files.__getitem__, set(files), where, vocab_size)
        self._given = None
        return self

    def _begin(self, read: Callable[[str], bytes], names: set[str], where: str, vocab_size: int) -> None:
        self._read, self._names = read, names
        self._where, self._vocab_size = where, vocab_size
        source = TEMPLATE_FILE if TEMPLATE_FILE in names else TOKENIZER_CONFIG
        self._template_where = f"{where}: {source}"
        self._noted: set[str] = set()
        self._early: Early[Tokenizer] | None = None

    def prepare(self) -> None:
        """Begins to load the tokenizer, beside what else it takes to open a bundle. Whatever is wrong with it
        is said when it is asked for: who runs token ids needs none."""
        if TOKENIZER not in self._names or self._early is not None:
            return
        where = f"{self._where}: {TOKENIZER}"
        try:
            data, declared = self._read(TOKENIZER), self._declared
        except KrasisError as error:
            logger.info("%s cannot be read: %s", where, error)
            return
        self._early = Early(lambda: Tokenizer(data, self._vocab_size, where, declared))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedModelError if the bundle has none, FormatError if it is damaged."""
        if TOKENIZER not in self._names:
            raise missing_tokenizer(self._where)
        if self._early is not None:
            return self._early.result()
        where = f"{self._where}: {TOKENIZER}"
        return Tokenizer(self._read(TOKENIZER), self._vocab_size, where, self._declared)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, None if the bundle has none."""
        source = self._given if self._given is not None else self._template_source()
        if source is None:
            return None
        tokens = {name: text for name in SPECIAL_NAMES if (text := token_text(self._tokens.get(name)))}
        return ChatTemplate(source, tokens, self._template_where)

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
    def markers(self) -> dict[int, str]:
        """Id -> text of the special tokens that mark thinking, or calls of tools."""
        return marker_tokens(self.thinking, self.tokenizer) | call_markers(self.tokenizer)

    def note_unused(self, variables: Variables) -> None:
        """Logs the names of variables that the template does not read, each once."""
        new = tuple(name for name in variables if f"variable {name}" not in self._noted)
        if new and self.template is not None:
            self._noted.update(f"variable {name}" for name in new)
            if note := unused_note(new, self.template.source):
                logger.warning("%s", note)

    @cached_property
    def _declared(self) -> DeclaredTokens:
        config = self._json_object(TOKENIZER_CONFIG)
        # As in transformers, the older files count only where the newer one does not list the tokens.
        older = "added_tokens_decoder" not in config
        special_map = self._json_object(SPECIAL_TOKENS_MAP) if older else {}
        added = self._json_object(ADDED_TOKENS) if older else {}
        return read_declared(config, special_map, added, f"{self._where}: {TOKENIZER_CONFIG}")

    @property
    def _tokens(self) -> Mapping[str, Any]:
        """tokenizer_config.json, with what special_tokens_map.json changes in it."""
        return self._declared.config

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
        return named_template(self._tokens.get("chat_template"), f"{self._where}: {TOKENIZER_CONFIG}")

    def _text(self, name: str) -> str:
        return decode_file(self._read(name), f"{self._where}: {name}")

    def _json_object(self, name: str) -> Mapping[str, Any]:
        if name not in self._names:
            return {}
        return parse_text_json(self._read(name), f"{self._where}: {name}")


def parse_text_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object of a text file. Raises FormatError, which says what the file is if that is evident."""
    try:
        return parse_json_object(
            data.removeprefix(BYTE_ORDER_MARK.encode()), where, max_bytes=MAX_CONFIG_BYTES
        )
    except FormatError as error:
        hint = what_it_is(data)
        if not hint:
            raise
        raise FormatError(error.what, where=where, got=error.got, limit=error.limit, hint=hint) from error


def named_template(value: object, where: str) -> str | None:
    """The template of a ``chat_template`` entry: text, or the default one of several. None for none."""
    if isinstance(value, list):
        # Several named templates: {"name": ..., "template": ...}.
        value = {str(one.get("name")): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError("chat_template must be text", where=where, got=type(value).__name__)
    return value or None


def read_template(path: Path) -> str:
    """A file's chat template: Jinja, or JSON that has a chat_template. Raises FormatError, ResourceError."""
    data = read_small_file(path, MAX_CONFIG_BYTES, follow_links=True)
    if path.suffix.lower() == ".json":
        source = named_template(parse_text_json(data, str(path)).get("chat_template"), str(path))
    else:
        source = decode_file(data, str(path))
    hint = what_it_is(data)
    if hint or source is None or not source.strip():
        raise FormatError(
            "the file has no chat template",
            where=str(path),
            hint=hint or "give a .jinja file, or a tokenizer_config.json that has one",
        )
    return source
