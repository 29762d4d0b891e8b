"""Variables of chat templates: how they are given, which names may be, and what a template offers."""

from __future__ import annotations

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.settings import EngineSettings
from krasis.runtime.template_values import (
    check_variables,
    merged_variables,
    parse_assignment,
    refuse_variables,
)
from krasis.runtime.text.template_variables import names_offered, names_read, think_variables, unused_note

QWEN = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}"
    "{%- for message in messages %}{%- set content = message.content %}{{ message.role + content }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% set ns = namespace(is_first=false) %}{{ bos_token }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if thinking %}<think>{% else %}</think>{% endif %}"
)
GPT_OSS = (
    "{%- macro greet(name) -%}{{ name }}{%- endmacro -%}"
    '{%- set effort = reasoning_effort | default("medium") %}'
    "{{ greet(effort) }}{{ strftime_now('%Y') }}{{ range(3) | length }}{{ model_identity }}"
)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("enable_thinking=false", "enable_thinking", False),
        ("enable_thinking=False", "enable_thinking", False),
        ("enable_thinking=off", "enable_thinking", False),
        ("thinking=0", "thinking", False),
        ("thinking=1", "thinking", True),
        ("reasoning_effort=high", "reasoning_effort", "high"),
        ('reasoning_effort="high"', "reasoning_effort", "high"),
        ("mode=off", "mode", "off"),
        ("budget=-1", "budget", -1),
        ("x=0.5", "x", 0.5),
        ("x=null", "x", None),
        ("x=None", "x", None),
        ("x=", "x", ""),
        ("x=a=b", "x", "a=b"),
        ("x= two words ", "x", " two words "),
        ('x=["a", {"b": 1}]', "x", ["a", {"b": 1}]),
        ("x=[not json", "x", "[not json"),
        ("x=NaN", "x", "NaN"),
        ("x=" + "[" * 10_000, "x", "[" * 10_000),
    ],
)
def test_values_are_json_or_else_text(text: str, name: str, value: object) -> None:
    found = parse_assignment(text)
    assert found == (name, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("messages=[]", "tools=[]", "documents=1", "add_generation_prompt=true", "bos_token=x"),
        *("krasis_step=1", "range=1", "raise_exception=x", "loop=1", "self=1", "true=1", "namespace=1"),
        *("noequals", "=1", "a b=1", "1a=1", "a.b=1", "\u00e4\u2028=1", "x=\udcff", "x=" + "a" * 70_000),
        "n" * 65 + "=1",
    ],
)
def test_names_and_values_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_assignment(text)


def test_values_of_the_library_are_of_jsons_types() -> None:
    nested: list[object] = []
    for _ in range(40):
        nested = [nested]
    for bad in (object(), b"x", {1: object()}, nested, ["\ud800"]):
        with pytest.raises(UsageError):
            check_variables({"x": bad})
    with pytest.raises(UsageError, match="messages"):
        EngineSettings(template_vars={"messages": []})
    assert merged_variables({"a": 1, "b": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(UsageError, match="chat template"):
        refuse_variables({"enable_thinking": True})


def test_what_a_template_offers_is_found_without_its_own_names() -> None:
    assert names_offered(QWEN) == ("enable_thinking",)
    assert names_offered(DEEPSEEK) == ("thinking",)
    assert names_offered(GPT_OSS) == ("model_identity", "reasoning_effort")
    for broken in ("{% if %}", "{{", "{% for x in %}", "{{ " + "(" * 5000):
        assert names_offered(broken) == ()
        assert names_read(broken) == frozenset()


def test_nothing_of_a_template_is_computed_to_find_its_names() -> None:
    assert names_offered("{{ 'x' * 10**12 }}{{ 9**9**9 }}{{ y }}") == ("y",)


def test_the_switch_of_thinking_has_more_than_one_name() -> None:
    assert think_variables(False, names_read(QWEN)) == {"enable_thinking": False}
    assert think_variables(True, names_read(DEEPSEEK)) == {"thinking": True}
    assert think_variables(True, names_read(GPT_OSS)) == {}
    assert think_variables(None, names_read(QWEN)) == {}
    assert think_variables(False, frozenset(["thinking_mode", "x"])) == {"thinking_mode": "disabled"}


def test_unused_variables_are_named() -> None:
    assert unused_note((), QWEN) == unused_note(("enable_thinking",), QWEN) == ""
    note = unused_note(("enable_thinking", "budget", "tone"), QWEN)
    assert "budget, tone" in note
    assert "it offers: enable_thinking" in note
