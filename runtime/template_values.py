"""What a caller may tell a chat template beside the conversation: names and values, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown
from krasis.formats.strict_json import parse_json

Variables = Mapping[str, object]

MAX_VALUE_BYTES = 64 * 1024
MAX_DEPTH = 16
# Set by the program: a template that was told another value would not render the conversation.
RESERVED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"]
)
# The tokenizer's, and Jinja's own names.
TAKEN = frozenset(
    [
        *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
        *("loop", "self", "super", "caller", "varargs", "kwargs", "true", "false", "none"),
        *("True", "False", "None", "range", "dict", "namespace", "cycler", "joiner", "lipsum"),
        *("raise_exception", "strftime_now"),
    ]
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# What templates call the switch of --think, and their values for on and off: Qwen, GLM and others; DeepSeek,
# Kimi and Granite; MiniMax.
THINK_SWITCHES: dict[str, tuple[object, object]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "thinking_mode": ("enabled", "disabled"),
}
SWITCH_WORDS = {
    **dict.fromkeys(("on", "true", "yes", "1"), True),
    **dict.fromkeys(("off", "false", "no", "0"), False),
}
_PYTHON = {"True": True, "False": False, "None": None}


def check_variables(variables: Variables) -> None:
    """Raises UsageError for a name or value that a template cannot be given."""
    for name, value in variables.items():
        if not isinstance(name, str) or not _NAME.match(name):
            raise UsageError("this cannot be the name of a template variable", got=shown(name))
        if name in RESERVED or name in TAKEN or name.startswith("krasis_"):
            raise UsageError(
                "this template variable is set by the program",
                got=name,
                hint="messages come from the conversation, tokens from the tokenizer",
            )
        _check_value(name, value, MAX_DEPTH)


def _check_value(name: str, value: object, depth: int) -> None:
    if depth == 0:
        raise UsageError("a template variable is nested too deeply", where=name, limit=MAX_DEPTH)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(name, key, 1)
            _check_value(name, item, depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(name, item, depth - 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError("a template variable is not UTF-8 text", where=name) from error
    elif not (value is None or isinstance(value, bool | int | float)):
        raise UsageError("a template variable must be of JSON's types", where=name, got=type(value).__name__)


def parse_assignment(text: str) -> tuple[str, object]:
    """``NAME=VALUE`` of a command line: JSON values, anything else is text.

    Raises UsageError without ``=``, and as ``check_variables``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError("a template variable is given as NAME=VALUE", got=shown(text))
    found = {name.strip(): parse_value(value, name.strip())}
    check_variables(found)
    return next(iter(found.items()))


def parse_value(text: str, name: str = "") -> object:
    """JSON if it is JSON, else the text itself: ``true``, ``3``, ``["a"]``, ``high``.

    Python's True, False and None count as JSON's: as texts, a template would take them all for true. For the
    same reason the switches of thinking (name) take on and off.
    """
    word = text.strip()
    if word in _PYTHON:
        return _PYTHON[word]
    if isinstance(THINK_SWITCHES.get(name, ("",))[0], bool) and word.lower() in SWITCH_WORDS:
        return SWITCH_WORDS[word.lower()]
    if len(text) > MAX_VALUE_BYTES:
        raise UsageError("a template variable is too long", got=len(text), limit=MAX_VALUE_BYTES)
    try:
        return parse_json(word.encode(), "template variable", max_bytes=4 * MAX_VALUE_BYTES)
    except (FormatError, UnicodeEncodeError):
        return text


def merged_variables(settings: Variables, given: Variables | None) -> dict[str, object]:
    """The settings' variables and, on top, those of one call. Raises UsageError as ``check_variables``."""
    if not given:
        return dict(settings)
    check_variables(given)
    return {**settings, **given}


def refuse_variables(given: Variables | None) -> None:
    """Raises UsageError for variables that come with a prompt no template sees."""
    if given:
        raise UsageError(
            "template variables need messages and their chat template", got=", ".join(map(str, given))
        )
