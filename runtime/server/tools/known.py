"""The formats of calls, and which of them a model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from krasis.runtime.server.tools.calls import CallFormat, CallReader, Tools
from krasis.runtime.server.tools.gemma import OPENER as GEMMA_OPENER
from krasis.runtime.server.tools.gemma import GemmaReader
from krasis.runtime.server.tools.harmony import HARMONY
from krasis.runtime.server.tools.hermes import HERMES
from krasis.runtime.server.tools.json_object import ObjectReader, names_of
from krasis.runtime.server.tools.named_json import NamedForm, NamedJsonReader
from krasis.runtime.server.tools.nested_tags import OPENER as M3_OPENER
from krasis.runtime.server.tools.nested_tags import SIGN, NestedTagReader
from krasis.runtime.server.tools.pythonic import PythonicReader, write_list
from krasis.runtime.server.tools.section import Section, SectionReader
from krasis.runtime.server.tools.tagged import TaggedReader, Tags
from krasis.runtime.server.tools.xml import XML

_CALLS, _CALL, _SEP = (
    "\uff5ctool\u2581calls\u2581{}\uff5c",
    "\uff5ctool\u2581call\u2581{}\uff5c",
    "<\uff5ctool\u2581sep\uff5c>",
)


def _tagged(name: str, tags: Tags) -> CallFormat:
    return CallFormat(name, (tags.opener,), partial(TaggedReader, tags))


def _section(name: str, section: Section, **more: Any) -> CallFormat:
    return CallFormat(name, section.opens, partial(SectionReader, section), **more)


def _named(form: NamedForm) -> Callable[[Tools], CallReader]:
    def reader(tools: Tools) -> CallReader:
        del tools  # the arguments are JSON
        return NamedJsonReader(form)

    return reader


def _object(tools: Tools) -> CallReader:
    del tools
    return ObjectReader()


def _offered_object(tools: Tools) -> CallReader:
    return ObjectReader(names_of(tools))


def _written_objects(calls: Sequence[tuple[str, Any]]) -> str:
    return json.dumps([{"name": name, "arguments": values} for name, values in calls], ensure_ascii=False)


GLM_TAGS = Tags("<tool_call>", "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>", value="<arg_value>")
HY_TAGS = Tags(
    *("<tool_call:opensource>", "<arg_key:opensource>", "</arg_key:opensource>"),
    *("</arg_value:opensource>", "</tool_call:opensource>"),
    name_end="<tool_sep:opensource>",
    value="<arg_value:opensource>",
)
M2_TAGS = Tags("<invoke name=", "<parameter name=", ">", "</parameter>", "</invoke>", name_end=">")


def _dsml_tags(space: str) -> Tags:
    mark = f"\uff5cDSML\uff5c{space}"
    return Tags(
        *(f"<{mark}invoke name=", f"<{mark}parameter name=", ">", f"</{mark}parameter>", f"</{mark}invoke>"),
        name_end=">",
        says_text=True,
    )


def _dsml(name: str, section: str, space: str = "") -> CallFormat:
    tags, mark = _dsml_tags(space), f"\uff5cDSML\uff5c{section}>"
    return _section(name, Section((f"<{mark}",), f"</{mark}", tags.opener, partial(TaggedReader, tags)))


ARG_KEYS = _tagged("arg_keys", GLM_TAGS)
HY3 = _section(
    "hy3",
    Section(
        *(("<tool_calls:opensource>",), "</tool_calls:opensource>", HY_TAGS.opener),
        partial(TaggedReader, HY_TAGS),
    ),
)
MINIMAX = _section(
    "minimax",
    Section(("<minimax:tool_call>",), "</minimax:tool_call>", M2_TAGS.opener, partial(TaggedReader, M2_TAGS)),
)
MINIMAX_M3 = _section(
    "minimax_m3", Section((f"{SIGN}<tool_call>",), f"{SIGN}</tool_call>", M3_OPENER, NestedTagReader)
)
DSML = _dsml("dsml", "function_calls")
DSML_V4 = _dsml("dsml_v4", "tool_calls")
DSML_V41 = _dsml("dsml_v41", " calls", " ")
_KIMI_CALL = NamedForm(
    "<|tool_call_begin|>",
    re.compile(
        r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s<>{}:]+)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*"
    ),
    ("<|tool_call_end|>",),
)
KIMI = _section(
    "kimi",
    Section(
        *(("<|tool_calls_section_begin|>",), "<|tool_calls_section_end|>", _KIMI_CALL.opener),
        _named(_KIMI_CALL),
    ),
    ids="numbered",
)


def _deepseek(name: str, head: str, closes: tuple[str, ...], shape: str) -> CallFormat:
    """shape: of one call, with places for name and arguments."""
    form = NamedForm(f"<{_CALL.format('begin')}>", re.compile(head, re.DOTALL), closes)
    begin, end = (f"<{_CALLS.format(one)}>" for one in ("begin", "end"))

    def write(calls: Sequence[tuple[str, Any]]) -> str:
        inside = [shape.format(one, json.dumps(values, ensure_ascii=False)) for one, values in calls]
        return begin + "".join(f"{form.opener}{one}{_DEEPSEEK_END}" for one in inside) + end

    return _section(name, Section((begin,), end, form.opener, _named(form)), write=write)


_DEEPSEEK_END = f"<{_CALL.format('end')}>"
# Either form is read in both: fine-tunes of one model are given the other's template.
_DEEPSEEK_HEAD = rf"\s*(?:function{_SEP})?(?P<name>[^\s<>{{}}]+)\s*(?:{_SEP})?\s*(?:```(?:json)?\s*)?"
_DEEPSEEK_ENDS = (_DEEPSEEK_END, f"```{_DEEPSEEK_END}", f"```\n{_DEEPSEEK_END}")
DEEPSEEK = _deepseek("deepseek", _DEEPSEEK_HEAD, _DEEPSEEK_ENDS, f"function{_SEP}{{}}\n```json\n{{}}\n```")
DEEPSEEK_V31 = _deepseek("deepseek_v31", _DEEPSEEK_HEAD, _DEEPSEEK_ENDS, f"{{}}{_SEP}{{}}")
_MISTRAL_CALL = NamedForm(
    "[TOOL_CALLS]",
    re.compile(r"\s*(?P<name>[^\s<>{}\[\]]+)\s*(?:\[CALL_ID\]\s*(?P<id>[^\s\[\]]+)\s*)?(?:\[ARGS\])?\s*"),
)
MISTRAL = CallFormat("mistral", (_MISTRAL_CALL.opener,), _named(_MISTRAL_CALL), ids="nine")
MISTRAL_LIST = _section("mistral_list", Section(("[TOOL_CALLS]",), "]", "{", _object, "[,"), ids="nine")
COHERE = _section("cohere", Section(("<|START_ACTION|>",), "<|END_ACTION|>", "{", _object, "[],"))
HUNYUAN = _section("hunyuan", Section(("<tool_calls>",), "</tool_calls>", "{", _object, "[],"))
NEMOTRON = _section("nemotron", Section(("<TOOLCALL>",), "</TOOLCALL>", "{", _object, "[],"))
GRANITE = _section(
    "granite",
    Section(("<|tool_call|>",), "]", "{", _object, "[,"),
    write=lambda calls: f"<|tool_call|>{_written_objects(calls)}",
)
GIGACHAT = CallFormat(
    "gigachat",
    ("<|function_call|>", "function call<|role_sep|>"),
    partial(
        SectionReader,
        Section(("<|function_call|>", "function call<|role_sep|>"), "<|message_sep|>", "{", _object),
    ),
)
GEMMA = CallFormat("gemma", (GEMMA_OPENER,), GemmaReader)
LFM2 = _section(
    "lfm2",
    Section(("<|tool_call_start|>",), "<|tool_call_end|>", "[", PythonicReader),
    write=lambda calls: f"<|tool_call_start|>{write_list(calls)}<|tool_call_end|>",
)
_BARE = ('{"name"', '{"type": "function"', '{"function"')
_LLAMA = Section(("<|python_start|>", "<|python_tag|>", ""), "<|python_end|>", "{", _offered_object, ";,")
LLAMA = CallFormat("llama", ("<|python_start|>{", "<|python_tag|>{"), partial(SectionReader, _LLAMA), _BARE)

# What a template says, or a vocabulary has, where the model writes calls so. The first that fits counts.
_SIGNS: tuple[tuple[tuple[str, ...], CallFormat], ...] = (
    (("<function=",), XML),
    (("\uff5cDSML\uff5c", "function_calls"), DSML),
    (("\uff5cDSML\uff5c", "' invoke"), DSML_V41),
    (("\uff5cDSML\uff5c", "\uff5c invoke"), DSML_V41),
    (("\uff5cDSML\uff5c",), DSML_V4),
    ((SIGN,), MINIMAX_M3),
    (("<minimax:tool_call>",), MINIMAX),
    (("<|tool_call_argument_begin|>",), KIMI),
    (("<tool_sep", ":opensource"), HY3),
    (("<arg_key>",), ARG_KEYS),
    ((f"<{_CALL.format('begin')}>", "```json"), DEEPSEEK),
    ((f"<{_CALL.format('begin')}>",), DEEPSEEK_V31),
    (("<|channel|>commentary",), HARMONY),
    (("<|tool_call>call:",), GEMMA),
    (("<|tool_call_start|>",), LFM2),
    (("<|START_ACTION|>",), COHERE),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<tool_calls>[",), HUNYUAN),
    (("<TOOLCALL>",), NEMOTRON),
    (("<|role_sep|>", "function call"), GIGACHAT),
    (("<tool_call>",), HERMES),
    (("<|tool_call|>",), GRANITE),
    (('"parameters": ', "_start|>", "ipython"), LLAMA),
    (('"parameters": ', "<|eot"), LLAMA),
)
_BY_TOKEN = (("<|tool_call_start|>", LFM2), ("<|tool_call|>", GRANITE))
FORMATS = tuple(dict.fromkeys([*(one for _, one in _SIGNS), DEEPSEEK_V31]))


def format_of(source: str, has_token: Callable[[str], bool] = lambda _: False) -> CallFormat:
    """How a model writes calls, by its template; where that says nothing, by its vocabulary."""
    for signs, found in _SIGNS:
        if all(sign in source for sign in signs):
            return found
    if "tools" in source:
        for token, found in _BY_TOKEN:
            if has_token(token):
                return found
    return HERMES
