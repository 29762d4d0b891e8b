"""Messages as APIs send them make the prompt of transformers' apply_chat_template, or are refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime.stops import stop_texts
from krasis.runtime.text.chat import ChatTemplate, Message
from krasis.runtime.text.messages import read_messages, render_chat, token_ids

# The forms in which templates of models read messages.
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRING_OR_NOTHING = (
    "{%- for m in messages %}{%- set text = m.content if m.content is string else '' %}"
    "{{- '<' + m.role + '>' + text }}{%- endfor %}"
)
CONCATENATED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PARTS = (
    "{%- for m in messages %}<{{ m.role }}>{%- if m.content is string %}{{ m.content }}{%- else %}"
    "{%- for p in m.content %}{%- if 'text' in p %}{{ p.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{%- endfor %}"
)
TOOLS = (
    "{%- for m in messages %}<{{ m.role }}>"
    "{%- if m.reasoning_content is defined %}({{ m.reasoning_content }}){%- endif %}"
    "{%- if m.content %}{{ m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}"
    "[{{ f.name }} ARGUMENTS]{%- endfor %}{%- endfor %}"
)
TEXT_OR_JSON = TOOLS.replace(
    "ARGUMENTS", "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
)  # Qwen3
ALWAYS_JSON = TOOLS.replace("ARGUMENTS", "{{ f.arguments | tojson }}")  # Qwen2.5, Llama 3
ITEMS = TOOLS.replace(
    "ARGUMENTS", "{% for k, v in f.arguments|items %}{{ k }}={{ v }};{% endfor %}"
)  # Qwen3-Coder
USERS_ONLY = (
    "{% for m in messages if m.role in ('user', 'system') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def texts(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    inner = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": inner}], **more}


RESULT = {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"}


def prompt(template: str, messages: Any, **options: Any) -> str:
    return render_chat(ChatTemplate(template, {}), read_messages(messages), **options)


@pytest.fixture(scope="module")
def reference(theirs: Callable[[Path], Any]) -> Callable[[str, list[Any]], str]:
    tokenizer = theirs(Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe")

    def apply(template: str, messages: list[Any]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    return apply


SAME = {
    "text": (PLAIN, [user("hi"), {"role": "assistant", "content": "yes?"}, user("What is if?")]),
    "parts that the template reads": (PARTS, [user(texts("What is ", "if?"))]),
    "keys without a value": (
        TEXT_OR_JSON,
        [user("1+1?"), call('{"a":1}', content=None, refusal=None), RESULT],
    ),
    "arguments as text": (TEXT_OR_JSON, [user("1+1?"), call('{"a":  [1, "é"]}', content=""), RESULT]),
    "arguments as an object": (ALWAYS_JSON, [user("1+1?"), call({"a": [1, "é"]}, content=""), RESULT]),
    "unknown keys": (
        "{% for m in messages %}{{ m.content }} by {{ m.author }}{% endfor %}",
        [user("hi") | {"author": "me"}],
    ),
    "reasoning by an older name": (
        TEXT_OR_JSON,
        [user("q"), {"role": "assistant", "content": "a", "reasoning": "r"}],
    ),
    "developer": (PLAIN, [{"role": "developer", "content": "be brief"}, user("hi")]),
    "a role that the template names": (
        "{% for m in messages %}{% if m.role == 'critic' %}C{% endif %}{{ m.content }}{% endfor %}",
        [{"role": "critic", "content": "bad"}],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_prompt_of_transformers(name: str, reference: Callable[[str, list[Any]], str]) -> None:
    template, messages = SAME[name]
    assert prompt(template, messages) == reference(template, messages)


@pytest.mark.parametrize("template", [PLAIN, STRING_OR_NOTHING, CONCATENATED, PARTS])
@pytest.mark.parametrize("kind", ["text", "input_text"])
def test_text_parts_are_read_by_every_template(template: str, kind: str) -> None:
    parts = [{"type": kind, "text": "What is "}, {"type": kind, "text": "if?"}]
    assert prompt(template, [user(parts)]) == prompt(template, [user("What is if?")]) == "<user>What is if?"
    assert prompt(template, [user(["What is ", "if?"])]) == "<user>What is if?"


@pytest.mark.parametrize("template", [ALWAYS_JSON, ITEMS])
def test_arguments_become_objects_where_templates_need_them(
    template: str, reference: Callable[[str, list[Any]], str]
) -> None:
    as_object = [user("1+1?"), call({"a": 1, "b": "x"}, content=None), RESULT]
    as_text = [user("1+1?"), call('{"a":1,"b":"x"}', content=None), RESULT]
    assert prompt(template, as_text) == prompt(template, as_object) == reference(template, as_object)
    assert "add" in prompt(template, [user("?"), call("")])


def test_arguments_become_text_where_templates_need_it() -> None:
    concatenated = TOOLS.replace("ARGUMENTS", "{{ '' + f.arguments }}")  # DeepSeek V3.1
    assert '[add {"a": [1, "é"]}]' in prompt(concatenated, [user("1+1?"), call({"a": [1, "é"]})])


def test_content_that_is_not_there_is_empty_where_a_template_needs_it() -> None:
    template = CONCATENATED + "{{ messages[1].tool_calls[0].function.name }}"
    assert prompt(template, [user("1+1?"), call("{}", content=None)]) == "<user>1+1?<assistant>add"


def test_a_developer_is_a_system_where_there_is_no_other() -> None:
    messages = [{"role": "developer", "content": "be brief"}, user("hi")]
    assert prompt(USERS_ONLY, messages) == "<system>be brief<user>hi"


def test_a_developer_is_a_system_where_the_name_is_refused() -> None:
    strict = (
        "{% for m in messages %}"
        "{% if m.role not in ('user', 'system') %}{{ raise_exception('what?') }}{% endif %}"
    )
    messages = [{"role": "developer", "content": "be brief"}, user("hi")]
    assert (
        prompt(strict + "<{{ m.role }}>{{ m.content }}{% endfor %}", messages) == "<system>be brief<user>hi"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}"
        "{{ m.content[1:]|join('', 'text') }}{% endfor %}",
    ],
)
def test_templates_that_read_parts_only(template: str) -> None:
    assert prompt(template, [user("What is if?")]) == "<user>What is if?"
    assert prompt(template, [user(texts("What is ", "if?"))]) == "<user>What is if?"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(
    st.one_of(
        JSON,
        st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "tool", ""])},
                optional={"content": JSON, "tool_calls": JSON},
            ),
            max_size=3,
        ),
    )
)
@settings(max_examples=150, deadline=None)
def test_anything_is_read_or_refused(prompt_like: Any) -> None:
    with contextlib.suppress(KrasisError):
        assert isinstance(prompt(PARTS, prompt_like), str)


@dataclass
class Thing:
    role: str
    content: Any


class Model:
    """As pydantic's."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": texts("hi"), "name": None}


@pytest.mark.parametrize("message", [Message("user", "hi"), Thing("user", "hi"), Model(), user("hi")])
def test_objects_of_other_libraries(message: Any) -> None:
    assert prompt(PLAIN, [message]) == "<user>hi"
    assert prompt(PLAIN, (message,)) == prompt(PLAIN, iter([message])) == "<user>hi"


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
REFUSED: dict[str, tuple[Any, str]] = {
    "an image": ([user([*texts("what is this?"), IMAGE])], "message 1.*text only.*image_url"),
    "sound": ([user([{"type": "input_audio"}])], "text only.*input_audio"),
    "a part of no kind": ([user([{"x": 1}])], "text only"),
    "a part without text": ([user([{"type": "text"}])], "must have text"),
    "a part that is a number": ([user([7])], "part of content must be an object"),
    "no content": ([{"role": "user"}], "message 1: a message must have content"),
    "content of null": ([user("a"), {"role": "assistant", "content": None}], "message 2.*have content"),
    "no role": ([{"content": "x"}], "message 1: a message must have a role"),
    "a role of null": ([{"role": None, "content": "x"}], "must have a role"),
    "a role that is no text": ([{"role": 1, "content": "x"}], "must have a role"),
    "an unknown role": ([{"role": "usr", "content": "x"}], "unknown role.*'usr'"),
    "content that is bytes": ([user(b"x")], "got bytes"),
    "content that is an object": ([user({"text": "x"})], "text or a list of text parts"),
    "content that is a number": ([user(5)], "text or a list of text parts"),
    "half a character": ([user("a\udcff")], "message 1.*not UTF-8"),
    "half a character in a part": ([user(texts("a\ud83d"))], "not UTF-8"),
    "half a character in a key": ([user("a") | {"\udcff": 1}], "not UTF-8"),
    "half a character in a call": ([user("a"), call({"x": "\udcff"})], "not UTF-8"),
    "texts": (["a", "b"], "object with role and content"),
    "text and ids": (["a", 1], "object with role and content"),
    "ids and messages": ([1, user("a")], "object with role and content"),
    "bytes": (b"abc", "list of messages.*got bytes"),
    "a bytearray": (bytearray(b"abc"), "list of messages"),
    "a number": (7, "list of messages"),
    "nothing": (None, "list of messages"),
    "one message": (user("a"), "put it into a list"),
    "one Message": (Message("user", "a"), "put it into a list"),
    "true and false": ([True, False], "object with role and content"),
    "numbers with a point": ([1.0, 2.0], "object with role and content"),
    "nested ids": ([[1, 2], [3]], "object with role and content"),
    "calls that are no list": ([user("a"), {"role": "assistant", "tool_calls": {}}], "must be a list"),
    "a call without a name": (
        [user("a"), {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "with a name",
    ),
    "a call that is text": ([user("a"), {"role": "assistant", "tool_calls": ["add"]}], "with a name"),
    "arguments that are a list": ([user("a"), call([1])], "JSON text or an object"),
    "calls that the template drops": ([user("a"), call("{}", content="")], "does not use tool_calls"),
    "an object of the caller": ([user("a") | {"extra": object()}], "text, numbers, lists"),
    "not a number": ([user("a") | {"extra": float("nan")}], "finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    messages, what = REFUSED[name]
    with pytest.raises(UsageError, match=what):
        prompt(CONCATENATED, messages)


@pytest.mark.parametrize("arguments", ["{", "nonsense", "[1]", '"x"', '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused_where_one_is_needed(arguments: str) -> None:
    with pytest.raises(UsageError, match=r"arguments|finite"):
        prompt(ALWAYS_JSON, [user("a"), call(arguments)])


@pytest.mark.parametrize("role", ["tool", "function", "developer"])
def test_a_message_that_the_template_leaves_out_is_refused(role: str) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match=f"message 2: the chat template leaves this message out.*{role}"):
        prompt(template, [user("What is if?"), {"role": role, "content": "nineteen"}])


def test_messages_that_refer_to_themselves_end() -> None:
    loop: dict[str, Any] = user("a")
    loop["extra"] = loop
    with pytest.raises(UsageError, match="nested too deeply"):
        read_messages([loop])


def test_a_template_that_changes_the_words_is_not_suspected() -> None:
    trimmed = "{% for m in messages %}{{ m.content | trim | replace('<', '&lt;') }}{% endfor %}"
    assert prompt(trimmed, [user("  Is 1 < 2 ?\n"), user("?!"), user("   ")]) == "Is 1 &lt; 2 ??!"


def test_ids() -> None:
    assert token_ids([1, np.int64(2)]) == token_ids(np.array([1, 2])) == token_ids((1, 2)) == [1, 2]
    assert token_ids([]) == []
    for other in (b"ab", bytearray(b"ab"), memoryview(b"ab"), [True], [1.0], ["a"], {1: 2}, np.array([1.5])):
        assert token_ids(other) is None


def test_one_text_is_one_stop() -> None:
    assert stop_texts("END") == ("END",)
    assert stop_texts(["a", "b"]) == stop_texts(("a", "b")) == ("a", "b")
    assert stop_texts(None) == stop_texts(()) == ()
    for wrong in (b"END", 7, [7], [b"a"], {"a": 1}, ["a\udcff"], "\ud800"):
        with pytest.raises(UsageError, match="stop"):
            stop_texts(wrong)


def test_a_template_that_writes_half_a_character() -> None:
    with pytest.raises(KrasisError, match=r"half characters|refused"):
        prompt("{{ '\\ud800' }}{{ messages[0].content }}", [user("hi")])
