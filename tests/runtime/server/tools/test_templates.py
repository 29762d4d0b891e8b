"""What templates with whims of their own about tools are given."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from krasis.runtime.server.prompt import Prompts
from krasis.runtime.server.tools.calls import Call
from krasis.runtime.server.tools.one_each import one_call_each
from krasis.runtime.server.tools.own_ids import with_own_ids
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.server.tools.xml import XML
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.call_markers import call_markers
from krasis.runtime.text.ends import ends_of_text
from tests.runtime.server.conftest import TINY, TOOLS, tiny_files

ARGUMENTS = {"city": "Oslo"}
HEAD = "{% for message in messages %}[{{ message.role }}]{{ message.content or '' }}"
CALLS = "{% for tool_call in message.tool_calls or [] %}"
TAIL = "{% endfor %}{% if message.role == 'tool' %}({{ message.tool_call_id }}){% endif %}{% endfor %}"
KIMI = "<|tool_call_begin|>{{ tool_call.id }}<|tool_call_argument_begin|>"


def prompts(template: str, replay: Replay | None = None) -> Prompts:
    assets = TextAssets.of_files(tiny_files(template), "tiny", 4096)
    return Prompts(assets, 4096, replay or Replay())


def conversation(*ids: str) -> list[dict[str, Any]]:
    """A question, a message with calls of these ids, and their results."""
    function = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}
    calls = [{"id": one, "type": "function", "function": function} for one in ids]
    results = [{"role": "tool", "tool_call_id": one, "content": f"sun {one}"} for one in ids]
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results,
    ]


def test_kimi_gets_its_own_ids() -> None:
    template = (
        HEAD
        + CALLS
        + KIMI
        + "{{ tool_call.function.arguments | tojson }}<|tool_call_end|>"
        + TAIL
        + "{{ tools }}"
    )
    replay = Replay()
    begin = "<|tool_call_begin|>functions.get_weather:7<|tool_call_argument_begin|>"
    raw = begin + '{"city":  "Oslo"}<|tool_call_end|>'
    known = replay.remember(Call("get_weather", '{"city":  "Oslo"}', raw, "functions.get_weather:7"))
    text = prompts(template, replay).text(conversation(known, "call_other"), TOOLS)
    assert "functions.get_weather:7" in text
    assert "(functions.get_weather:7)" in text
    assert "<|tool_call_begin|>functions.get_weather:1<" in text
    assert "(functions.get_weather:1)" in text


def test_mistral_gets_ids_of_nine_characters() -> None:
    check = "{% if tool_call.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    template = (
        HEAD + CALLS + check + "[TOOL_CALLS]f[CALL_ID]{{ tool_call.id }}[ARGS]{}" + TAIL + "{{ tools }}"
    )
    text = prompts(template).text(conversation("call_" + "0" * 24, "abcdefghi"), TOOLS)
    first = text.split("[CALL_ID]")[1][:9]
    assert first.isalnum()
    assert f"({first})" in text
    assert "[CALL_ID]abcdefghi" in text
    assert prompts(template).text(conversation("call_" + "0" * 24, "abcdefghi"), TOOLS) == text


def test_a_template_of_one_call_a_message_gets_one_each() -> None:
    written = "{% if message.tool_calls %}<{{ message.tool_calls[0].function.name }}>{% endif %}"
    silent = (
        HEAD
        + written
        + "{% if message.role == 'tool' %}({{ message.tool_call_id }}){% endif %}{% endfor %}{{ tools }}"
    )
    loud = silent.replace(
        "<{{", "{% if message.tool_calls | length > 1 %}{{ raise_exception('one!') }}{% endif %}<{{"
    )
    for template in (silent, loud):
        text = prompts(template).text(conversation("a", "b"), TOOLS)
        pieces = "[assistant]<get_weather>[tool]sun a(a)[assistant]<get_weather>[tool]sun b(b)"
        assert pieces in text, template


def test_a_template_that_writes_calls_beside_no_content() -> None:
    """As DeepSeek-V3's and R1's, which take arguments as text alone."""
    call = "{{ '<\uff5ctool\u2581call\u2581begin\uff5c>' + message.tool_calls[0].function.arguments }}"
    template = (
        HEAD + "{% if message.content is none and message.tool_calls %}" + call + "{% endif %}{% endfor %}"
    )
    text = prompts(template).text(conversation("a"), TOOLS)
    assert '<\uff5ctool\u2581call\u2581begin\uff5c>{"city": "Oslo"}' in text
    # It says nothing of tools: they are described, with a call in the model's own form.
    assert "get_weather" in text.split("[user]")[0]
    assert "<\uff5ctool\u2581sep\uff5c>" in text.split("[user]")[0]


def test_a_template_that_writes_no_calls() -> None:
    """As LFM2's and Granite 3's: they describe tools, and take the model's writing for words."""
    template = "{{ tools }}{# <|tool_call|> #}" + HEAD + "{% endfor %}"
    text = prompts(template).text(conversation("a"), TOOLS)
    assert (
        '[assistant]<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}][tool]sun a' in text
    )


def test_arguments_that_a_template_puts_into_braces_are_objects() -> None:
    """As Gemma's, which takes text for the inside of an object."""
    pairs = "{% for k, v in a.items() %}{{ k }}:{{ v }}{% endfor %}"
    body = "{% if a is string %}{{ a }}{% else %}" + pairs + "{% endif %}"
    call = "{% set a = tool_call.function.arguments %}call:f{{ '{' }}" + body + "{{ '}' }}{% endfor %}"
    template = HEAD + CALLS + call + "{% endfor %}{{ tools }}"
    assert "call:f{city:Oslo}" in prompts(template).text(conversation("a"), TOOLS)


def test_marks_that_are_special_tokens_are_seen() -> None:
    files = tiny_files("{{ messages }}")
    tokenizer = json.loads((TINY / "tokenizer.json").read_bytes())
    unused = tokenizer["added_tokens"][0]["id"]
    tokenizer["added_tokens"][0]["content"] = "<|tool_call_begin|>"
    files["tokenizer.json"] = json.dumps(tokenizer).encode()
    for name in ("tokenizer_config.json", "generation_config.json"):
        del files[name]
    assets = TextAssets.of_files(files, "tiny", 4096)
    assert call_markers(assets.tokenizer) == {unused: "<|tool_call_begin|>"}
    ids = assets.tokenizer.encode("a<|tool_call_begin|>b")
    stream = ends_of_text(assets, [1], (), is_plain=False, split=True).stream
    assert "".join(map(stream.push, ids)) + stream.finish() == "a<|tool_call_begin|>b"


@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_a_conversation_without_ids_is_no_error(content: str | None) -> None:
    rows = conversation("a", "b")
    for row in rows:
        row.pop("tool_call_id", None)
        for call in row.get("tool_calls", ()):
            del call["id"]
    rows[1]["content"] = content
    for signs in ("<|tool_call_argument_begin|>", "[TOOL_CALLS]", "<tool_call>"):
        assert prompts("{{ tools }}{#" + signs + "#}" + HEAD + CALLS + "x" + TAIL).text(rows, TOOLS)


def test_thousands_of_calls_in_one_message_take_a_moment() -> None:
    """What looks for each result among all takes minutes."""
    rows = conversation(*(f"call{number}" for number in range(8000)))
    begin = time.process_time()
    changed = with_own_ids(one_call_each(rows), "numbered", lambda _: None)
    assert len(changed) == 1 + 2 * 8000
    assert changed[-1]["tool_call_id"] == changed[-2]["tool_calls"][0]["id"] == "functions.get_weather:7999"
    assert time.process_time() - begin < 4


def test_results_without_ids_follow_in_their_order() -> None:
    rows = conversation("a", "b")
    for row in rows[2:]:
        del row["tool_call_id"]
    roles = [(row["role"], row["content"]) for row in one_call_each(rows)]
    assert roles[1:] == [("assistant", None), ("tool", "sun a"), ("assistant", ""), ("tool", "sun b")]


def test_a_long_conversation_full_of_marks_takes_a_moment() -> None:
    """What looks for every mark up to the end each time takes minutes."""
    replay = Replay()
    rows = [{"tool_calls": [{"id": replay.remember(Call("f", "{}", "<function=f>\n</function>"))}]}]
    text = "<tool_call> or " * 10_000
    begin = time.process_time()
    assert replay.restored(text, rows, XML, []) == text
    assert time.process_time() - begin < 8
