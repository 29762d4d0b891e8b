"""What a chat template is told beside the conversation: enable_thinking and what else its author offers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown
from krasis.formats.process.worker_protocol import unpack_parts
from krasis.formats.strict_json import parse_json
from krasis.runtime.text.sandbox import Resident, shared_sandbox

if TYPE_CHECKING:
    from jinja2 import nodes

logger = logging.getLogger(__name__)

Variables = Mapping[str, object]

MAX_VALUE_BYTES = 64 * 1024
MAX_DEPTH = 16
# Set by the program: a template that was told another value would not render the conversation.
RESERVED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"]
)
# The tokenizer's, and Jinja's own names.
_TAKEN = frozenset(
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
        if name in RESERVED or name in _TAKEN or name.startswith("krasis_"):
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


def names_read(source: str) -> frozenset[str]:
    """All names that a template reads, its own among them. Empty for one that does not parse."""
    return _names(source)[0]


def names_offered(source: str) -> tuple[str, ...]:
    """The variables that a template lets its caller choose, sorted. Empty for one that does not parse."""
    return _names(source)[1]


@lru_cache(maxsize=8)
def _names(source: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Both, found by the worker: parsing a stranger's template may take seconds or exhaust the stack."""
    data = source.encode("utf-8", "surrogatepass")
    failure = "the names in the chat template cannot be found"
    try:
        answer = shared_sandbox().load(Resident("load_names", data, "chat template", failure))
        (read, offered), _ = unpack_parts(answer)
        return frozenset(map(str, read)), tuple(map(str, offered))
    except (FormatError, ValueError, TypeError) as error:
        logger.info("%s: %s", failure, error)
        return frozenset(), ()


def names_in(source: str) -> tuple[list[str], list[str]]:
    """What ``names_read`` and ``names_offered`` give, found here: it is for the worker."""
    return sorted(_names_read(source)), list(_names_offered(source))


def _names_read(source: str) -> frozenset[str]:
    from jinja2 import nodes

    tree = _parse(source)
    if tree is None:
        return frozenset()
    return frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")


def _names_offered(source: str) -> tuple[str, ...]:
    from jinja2 import nodes

    tree = _parse(source)
    if tree is None:
        return ()
    read: set[str] = set()
    bound: set[str] = set()
    tested: set[str] = set()
    for node in tree.find_all((nodes.Name, nodes.Macro, nodes.Test, nodes.Filter)):
        if isinstance(node, nodes.Name):
            (read if node.ctx == "load" else bound).add(node.name)
        elif isinstance(node, nodes.Macro):
            bound.add(node.name)
        elif isinstance(node, nodes.Test | nodes.Filter):
            tested |= _tested_name(node)
    for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tested -= _loop_names(loop)
    offered = ((read - bound) | (tested & read)) - RESERVED - _TAKEN
    return tuple(sorted(name for name in offered if not name.startswith("krasis_")))


def _tested_name(node: nodes.Test | nodes.Filter) -> set[str]:
    """The name whose presence is asked for: ``x is defined``, ``x | default(1)``."""
    from jinja2 import nodes

    if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name):
        return {node.node.name}
    return set()


def _loop_names(node: nodes.Node) -> set[str]:
    from jinja2 import nodes

    targets: Iterable[nodes.Node] = getattr(node, "args", [])
    if isinstance(node, nodes.For):
        targets = [node.target]
    found: set[str] = set()
    for target in targets:
        if isinstance(target, nodes.Name):
            found.add(target.name)
        found |= {name.name for name in target.find_all(nodes.Name)}
    return found


def _parse(source: str) -> nodes.Template | None:
    """The tree, parsed only: nothing of the template is evaluated."""
    from jinja2 import Environment, TemplateError
    from jinja2.ext import loopcontrols

    from krasis.runtime.text.template_sandbox import GenerationTag

    try:
        environment = Environment(autoescape=False, extensions=[GenerationTag, loopcontrols])  # noqa: S701
        return environment.parse(source)
    except (TemplateError, RecursionError, ValueError):
        return None


def think_variables(think: bool | None, names: frozenset[str]) -> dict[str, object]:
    """What ``--think`` and ``--no-think`` tell a template that reads such names; empty without a switch."""
    if think is None:
        return {}
    return {name: on if think else off for name, (on, off) in THINK_SWITCHES.items() if name in names}


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


def unused_note(given: tuple[str, ...], source: str) -> str:
    """A sentence that names the variables a template does not read; empty if there are none."""
    names = names_read(source)
    unused = [name for name in given if name not in names]
    if not unused:
        return ""
    offered = ", ".join(names_offered(source)) or "none"
    return f"the chat template does not use {', '.join(unused)} (it offers: {offered})"
