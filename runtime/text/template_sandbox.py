"""The Jinja environment of chat templates: immutable, sandboxed, and with a bound on what a template may
spend.

Beyond Jinja's own sandbox: every step of a loop and every macro call is counted, ranges are short, strings
and powers cannot be multiplied into gigabytes. These give the clear sentences; what no such list can name (a
list that contains itself a thousand times and is printed) is bounded from outside: templates only run in a
worker with limits on time and memory (``worker``). The functions, filters and tags are those templates
of Hugging Face models use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from string import Formatter
from threading import Lock
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

MAX_STEPS = 250_000
MAX_RANGE = 10_000
MAX_STRING_CHARACTERS = 16 * 1024 * 1024
MAX_NUMBER = 2**63
MAX_INDENT = 64
_OWN_CHANGES: dict[Any, tuple[str, ...]] = {list: ("append", "pop"), dict: ("update",)}
_STEP_FILTER, _JOIN_FILTER = "krasis_step", "krasis_join"


class GenerationTag(Extension):
    """``{% generation %}`` marks an assistant's words for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration is no ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The tag's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. ``counting`` starts a fresh budget; threads take turns at it."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self._steps = 0
        self._given: frozenset[int] = frozenset()
        self._counting = Lock()
        self.filters["tojson"] = _to_json
        self.filters[_STEP_FILTER] = self._step
        self.filters[_JOIN_FILTER] = _join
        self.filters["replace"] = _replace
        self.filters["from_json"] = json.loads
        self.filters["indent"] = _indent
        # These make a string of any size from a number; no template of a model has needed them.
        for name in ("center", "format", "wordwrap"):
            self.filters.pop(name, None)
        self.globals.pop("lipsum", None)
        self.globals.update(
            {
                "range": _short_range,
                "raise_exception": _raise_exception,
                "strftime_now": _strftime_now,
            }
        )

    def compile_limited(self, source: str) -> Template:
        """The template with a counter in every loop and macro."""
        tree = self.parse(source)
        _count_steps(tree)
        _replace_concat(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    @contextmanager
    def counting(self, given: Iterable[object] = ()) -> Iterator[None]:
        """Within, a template may take MAX_STEPS steps, and changes nothing that is given."""
        with self._counting:
            self._steps = 0
            self._given = frozenset(id(one) for one in given)
            yield

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As Jinja's, but a template may add to lists and objects of its own, and take from them."""
        if attr in _OWN_CHANGES.get(type(obj), ()) and id(obj) not in self._given:
            return SandboxedEnvironment.is_safe_attribute(self, obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)

    @pass_context
    def _step(self, _: Context, __: None) -> str:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")
        return ""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses operations whose result could be huge."""
        if operator == "**" and (abs(left) > MAX_NUMBER or not 0 <= right <= 64):
            raise SecurityError("a power is out of range")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if not isinstance(one, (int, float)) and isinstance(other, int):
                    _check_size(len(one) * other)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% formatting of strings is not offered")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (str, list, tuple)):
            _check_size(len(result))
        if isinstance(result, int) and abs(result) > MAX_NUMBER:
            raise SecurityError("a number is out of range")
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls, with no number that a width or count could be made of."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > MAX_STRING_CHARACTERS:
                raise SecurityError(f"the number {value} is too large for a call")
        name, owner = (
            getattr(obj, "__name__", ""),
            getattr(getattr(obj, "__wrapped__", obj), "__self__", None),
        )
        if name == "format" and isinstance(owner, str):
            return _format(owner, args, kwargs)
        if name in ("format", "format_map"):
            raise SecurityError("str.format_map is not offered")
        if name == "replace" and isinstance(owner, str):
            return _replace(owner, *args)
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        return result


class SandboxedTemplate:
    """A compiled template. Raises what Jinja and Python raise: it is for a worker."""

    __slots__ = ("_environment", "_template")

    def __init__(self, source: str) -> None:
        self._environment = LimitedEnvironment()
        self._template = self._environment.compile_limited(source)

    def render(self, values: Mapping[str, Any], max_characters: int) -> str:
        """The text."""
        pieces: list[str] = []
        size = 0
        with self._environment.counting(values.values()):
            for piece in self._template.generate(values):
                size += len(piece)
                if size > max_characters:
                    raise SecurityError(f"it writes too much: more than {max_characters} characters")
                pieces.append(piece)
        return "".join(pieces)


def _count_steps(tree: nodes.Template) -> None:
    """Counts loops and macro calls."""
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        step = _own_filter(_STEP_FILTER, [])
        body: list[nodes.Node] = getattr(node, "body")  # noqa: B009  the stubs lose what find_all was asked for
        body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))


def _own_filter(name: str, arguments: list[nodes.Expr]) -> nodes.Expr:
    """A call of one of our filters. No function: a template could give its name another meaning; and a call
    through the sandbox takes ten times as long."""
    return nodes.Filter(nodes.Const(None), name, arguments, [], None, None)


def _replace_concat(node: nodes.Node) -> None:
    """Makes ``~`` a checked join."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _replace_concat(value)
            if isinstance(value, nodes.Concat):
                setattr(node, name, _join_call(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concat(item)
                    if isinstance(item, nodes.Concat):
                        value[index] = _join_call(item)


def _join_call(concat: nodes.Concat) -> nodes.Node:
    return _own_filter(_JOIN_FILTER, concat.nodes).set_lineno(concat.lineno)


@pass_context
def _join(_: Context, __: None, *parts: object) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(len(text) for text in texts))
    return "".join(texts)


def _replace(text: object, old: object, new: object, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_size(len(text) + (text.count(old) if count < 0 else count) * len(new))
    return text.replace(old, new, count)


def _format(form: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """``"<{}>".format(x)``: values in their places, as they are. Widths and attributes are not offered."""
    pieces: list[str] = []
    count = 0
    for text, name, form_of_value, conversion in Formatter().parse(form):
        pieces.append(text)
        if name is None:
            continue
        if form_of_value or conversion or not (name.isidentifier() or name.isdecimal() or not name):
            raise SecurityError("str.format is offered for plain places such as {} alone")
        place: str | int = name if name.isidentifier() else int(name or count)
        count += not name
        try:
            pieces.append(str(args[place] if isinstance(place, int) else kwargs[place]))
        except LookupError as error:
            raise TemplateError(f"str.format has no value for {{{name}}}") from error
        _check_size(sum(map(len, pieces)))
    return "".join(pieces)


def _indent(text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter, for widths that people use."""
    if len(width) > MAX_INDENT if isinstance(width, str) else not 0 <= width <= MAX_INDENT:
        raise SecurityError("indent is out of range")
    _check_size(len(str(text)) + (str(text).count("\n") + 1) * MAX_INDENT)
    return do_indent(str(text), width, first, blank)


def _check_size(size: int) -> None:
    if size > MAX_STRING_CHARACTERS:
        raise SecurityError(f"a value of {size} characters is too long")


def _short_range(*bounds: int) -> range:
    span = range(*bounds)
    if len(span) > MAX_RANGE:
        raise SecurityError(f"a range of {len(span)} is too long")
    return span


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models have not been trained on.
    if isinstance(value, Undefined):
        raise TemplateError("tojson of an undefined value")
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("indent is out of range")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
