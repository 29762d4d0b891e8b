"""A call that has to be: the grammar of one call, in each format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from krasis.runtime.server.errors import refused
from krasis.runtime.server.grammar import MAX_GRAMMAR_CHARACTERS, Grammar
from krasis.runtime.server.tools.calls import CallFormat, Tools, function_of
from krasis.runtime.server.tools.coerce import kinds_of
from krasis.runtime.server.tools.forced_nested import gemma_rule, nested_tag_rule, pythonic_rule
from krasis.runtime.server.tools.harmony import HARMONY
from krasis.runtime.server.tools.hermes import HERMES
from krasis.runtime.server.tools.known import (
    ARG_KEYS,
    COHERE,
    DEEPSEEK,
    DEEPSEEK_V31,
    DSML,
    DSML_V4,
    DSML_V41,
    GEMMA,
    GIGACHAT,
    GRANITE,
    HUNYUAN,
    HY3,
    KIMI,
    LFM2,
    LLAMA,
    MINIMAX,
    MINIMAX_M3,
    MISTRAL,
    MISTRAL_LIST,
    NEMOTRON,
)
from krasis.runtime.server.tools.spelling import Spelling, properties_of
from krasis.runtime.server.tools.xml import XML

Rule = Callable[[Spelling, str, str, Mapping[str, Any]], str]


def call_grammar(call_format: CallFormat, tools: Tools, special: Mapping[str, int] | None = None) -> Grammar:
    """One call of one of the tools, with the arguments that its schema allows. special: text -> id of the
    tokens that no text is made of. Raises ApiError for schemas that are too long.
    """
    spelling = Spelling(special or {})
    write = _RULES[call_format]
    names: list[str] = []
    for number, tool in enumerate(tools):
        function = function_of(tool)
        schema = dict(function.get("parameters") or {"type": "object"})
        body = write(spelling, f"call{number}", str(function["name"]), schema)
        names.append(spelling.add(f"call{number}", body))
    start = f"start: {_before(call_format, spelling)}({' | '.join(names)})"
    text = "\n".join([start, *spelling.rules])
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise refused(f"The tools' schemas are longer than {MAX_GRAMMAR_CHARACTERS} characters.", "tools")
    return Grammar("lark", text, "tools")


def _before(call_format: CallFormat, spelling: Spelling) -> str:
    """Harmony has no thinking that a prompt opens: it is a message of its own in front of the call."""
    if call_format is not HARMONY:
        return ""
    begin, end = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    return f"({spelling.literal(begin)} {spelling.text('thought', end)})? "


def _json(before: str, after: str, *, quoted: bool = False) -> Rule:
    """Arguments as JSON between two texts; NAME stands for the tool's in the first. quoted: in a string of
    JSON."""

    def rule(spelling: Spelling, rule: str, name: str, schema: Mapping[str, Any]) -> str:
        shown = json.dumps(name, ensure_ascii=False)[1:-1] if quoted else name
        begin, end = spelling.literal(before.replace("NAME", shown)), spelling.literal(after)
        return f"{begin} {spelling.json(f'{rule}_args', schema)} {end}"

    return rule


@dataclass(frozen=True, slots=True)
class _Marks:
    """What begins a call (NAME: the tool's), a value (KEY: its name) and ends both. json_value: what begins
    a value that is no text, if that is something else."""

    opens: str
    value: str
    value_end: str
    closes: str
    json_value: str = ""
    breaks: str = ""


def _tagged(marks: _Marks) -> Rule:
    """A value after the other."""

    def rule(spelling: Spelling, rule: str, name: str, schema: Mapping[str, Any]) -> str:
        known, must, shared = properties_of(schema)
        between = marks.breaks
        parts = [spelling.literal(marks.opens.replace("NAME", name)), between]
        for number, (key, value) in enumerate(known.items()):
            here = f"{rule}_p{number}"
            spelling.add(here, f"{_value(spelling, here, key, value, marks, shared)} {between}")
            parts.append(here if key in must else f"{here}?")
        return " ".join([*(one for one in parts if one), spelling.literal(marks.closes)])

    return rule


def _value(
    spelling: Spelling, rule: str, key: str, schema: object, marks: _Marks, shared: Mapping[str, Any]
) -> str:
    """A value between its marks."""
    begin = _with_breaks(spelling, marks.value.replace("KEY", key), marks.breaks)
    plain = f"{begin} {spelling.value(f'{rule}_v', schema, marks.value_end, shared)}"
    known = schema if isinstance(schema, Mapping) else {}
    if not marks.json_value or kinds_of(known) == {"string"}:
        return plain
    begin = spelling.literal(marks.json_value.replace("KEY", key))
    written = spelling.json(f"{rule}_j", {**known, **shared})
    as_json = f"{begin} {written} {spelling.literal(marks.value_end)}"
    return f"({plain} | {as_json})" if "string" in kinds_of(known) else as_json


def _with_breaks(spelling: Spelling, text: str, between: str) -> str:
    """A line break in text may be left out where lines may."""
    if not between:
        return spelling.literal(text)
    return f" {between} ".join(spelling.literal(one) for one in text.split("\n"))


def _dsml(space: str, section: str) -> Rule:
    mark = f"\uff5cDSML\uff5c{space}"
    value = f'<{mark}parameter name="KEY" string="{{}}">'
    return _tagged(
        _Marks(
            f'<\uff5cDSML\uff5c{section}>\n<{mark}invoke name="NAME">\n',
            value.format("true"),
            f"</{mark}parameter>\n",
            f"</{mark}invoke>\n</\uff5cDSML\uff5c{section}>",
            value.format("false"),
        )
    )


def _list(before: str, after: str) -> Rule:
    return _json(before + '{"name": "NAME", "arguments": ', "}" + after, quoted=True)


_OWN = ":opensource"
_BEGIN, _END = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>",
    ("<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>"),
)
_SEP = "<\uff5ctool\u2581sep\uff5c>"
_RULES: dict[CallFormat, Rule] = {
    HERMES: _list("<tool_call>\n", "\n</tool_call>"),
    XML: _tagged(
        _Marks(
            "<tool_call>\n<function=NAME>\n",
            *("<parameter=KEY>\n", "\n</parameter>\n", "</function>\n</tool_call>"),
        )
    ),
    ARG_KEYS: _tagged(
        _Marks(
            *("<tool_call>NAME", "<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>", "</tool_call>"),
            breaks='"\\n"?',
        )
    ),
    HY3: _tagged(
        _Marks(
            f"<tool_calls{_OWN}>\n<tool_call{_OWN}>NAME<tool_sep{_OWN}>\n",
            f"<arg_key{_OWN}>KEY</arg_key{_OWN}>\n<arg_value{_OWN}>",
            f"</arg_value{_OWN}>\n",
            f"</tool_call{_OWN}>\n</tool_calls{_OWN}>",
        )
    ),
    MINIMAX: _tagged(
        _Marks(
            '<minimax:tool_call>\n<invoke name="NAME">\n',
            *('<parameter name="KEY">', "</parameter>\n", "</invoke>\n</minimax:tool_call>"),
        )
    ),
    MINIMAX_M3: nested_tag_rule,
    DSML: _dsml("", "function_calls"),
    DSML_V4: _dsml("", "tool_calls"),
    DSML_V41: _dsml(" ", " calls"),
    KIMI: _json(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    DEEPSEEK: _json(f"{_BEGIN}function{_SEP}NAME\n```json\n", f"\n```{_END}"),
    DEEPSEEK_V31: _json(f"{_BEGIN}NAME{_SEP}", _END),
    HARMONY: _json(" to=functions.NAME<|channel|>commentary json<|message|>", ""),
    GEMMA: gemma_rule,
    LFM2: pythonic_rule,
    COHERE: _json(
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "NAME", "parameters": ',
        *("}\n]<|END_ACTION|>",),
        quoted=True,
    ),
    MISTRAL: _json("[TOOL_CALLS]NAME[ARGS]", ""),
    MISTRAL_LIST: _list("[TOOL_CALLS][", "]"),
    HUNYUAN: _list("<tool_calls>[", "]</tool_calls>"),
    NEMOTRON: _list("<TOOLCALL>[", "]</TOOLCALL>"),
    GRANITE: _list("<|tool_call|>[", "]"),
    GIGACHAT: _list("<|function_call|>", ""),
    LLAMA: _json('{"name": "NAME", "parameters": ', "}", quoted=True),
}
