"""Whatever a client sends, it gets an answer or is refused with 4xx; nothing is this program's failure."""

from __future__ import annotations

import json
from typing import Any

import pytest

from krasis.runtime.serving.api import QueueFullError

from .conftest import Serve

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CLAUDE_TOOL = {"name": "f", "input_schema": {"type": "object"}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "tools": [TOOL], "max_tokens": 2},
    "/v1/messages": {"messages": HELLO, "tools": [CLAUDE_TOOL], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": HELLO, "tools": [CLAUDE_TOOL]},
    "/v1/responses": {"input": HELLO, "tools": [{"type": "function", "name": "f"}], "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"input": HELLO},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/completion": {"prompt": "Hello", "n_predict": 2},
    "/tokenize": {"content": "Hello"},
    "/detokenize": {"tokens": [5]},
    "/apply-template": {"messages": HELLO, "tools": [TOOL]},
}
NAMES = """model messages input prompt content tools tool_choice stream stream_options n best_of max_tokens
n_predict temperature top_k seed stop stop_sequences logprobs top_logprobs n_probs logit_bias response_format
json_schema grammar text reasoning reasoning_effort reasoning_format thinking system instructions
chat_template_kwargs prompt_cache_key id_slot echo response_fields cache_prompt tokens with_pieces"""
FIELDS = NAMES.split()


def deep(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    True,
    0,
    -1,
    2**70,
    0.5,
    1e308,
    "",
    "x",
    "\x00\ud83d\ude00\u202e",
    [],
    [None],
    [[]],
    [{}],
    ["x", 5],
    {},
    {"": None},
    {"type": "x"},
    {"type": ["x"], "text": {}, "role": [], "content": 5, "name": {}, "function": 7},
    {"type": "function", "function": {"name": {}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": 5}}},
    {"type": "allowed_tools", "allowed_tools": 5, "tools": 7, "mode": []},
    {"type": "allowed_tools", "tools": [5, {"function": 5}]},
    [{"type": "namespace", "tools": 5}],
    [{"type": "namespace", "tools": [{"name": 5}]}],
    [{"type": "function", "name": "f", "parameters": {"$ref": "#"}, "description": 5}],
    [{"role": "assistant", "tool_calls": 5}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": 5, "arguments": []}}]}],
    [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": [1]}]}],
    [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}]}]}],
    [{"role": "user", "content": [{"type": "document", "source": 5}]}],
    [{"type": "reasoning", "content": 5, "summary": [5], "encrypted_content": "\u00e9"}],
    [{"type": "function_call", "name": "f", "arguments": {}, "call_id": []}],
    [{"type": "function_call_output", "output": [{"type": []}], "call_id": {}}],
    [{"type": ["message"], "role": {}}],
    deep(60),
]


@pytest.mark.parametrize("path", BASES)
def test_values_of_every_kind_in_every_field(serve: Serve, path: str) -> None:
    """Reading a request is what is tried, so that what is sound is not answered."""
    served = serve(refusal=QueueFullError("tried", retry_after_s=1))
    bad = []
    for field in FIELDS:
        for value in VALUES:
            reply = served.post(path, {**BASES[path], field: value})
            if reply.status >= 500 or (reply.status >= 400 and not reply.json["error"]["message"]):
                bad.append((field, value, reply.text[:200]))
    assert not bad


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"tool_choice": {"type": ["x"]}}),
        ("/v1/chat/completions", {"tool_choice": {"type": "allowed_tools", "allowed_tools": 5}}),
        ("/v1/chat/completions", {"tools": [{"type": "namespace", "tools": 5}]}),
        ("/v1/responses", {"tools": [{"type": "namespace", "tools": "abc"}]}),
        ("/v1/responses", {"tool_choice": {"type": "allowed_tools", "tools": 7}}),
    ],
)
def test_what_once_failed(serve: Serve, path: str, body: dict[str, Any]) -> None:
    assert serve().post(path, {**BASES[path], **body}).status in (200, 400)


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe{}",
        b'{"messages": NaN}',
        b'{"a": 1e999999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800", "input": "\\udc00"}',
        b'{"prompt": "a", "prompt": "b", "messages": [], "messages": []}',
        json.dumps({str(number): 0 for number in range(20_000)}).encode(),
    ],
    ids=range(14),
)
def test_bodies_that_are_no_request(serve: Serve, path: str, body: bytes) -> None:
    reply = serve().ask("POST", path, body)
    assert 200 <= reply.status < 500, reply.text


def test_what_is_unknown_is_ignored_and_headers_may_say_anything(serve: Serve) -> None:
    served = serve()
    body = {"messages": HELLO, "nobody_knows": {"this": [1, 2, {"x": None}]}}
    headers = {
        "content-type": "text/x-nothing",
        "accept": "\xff",
        "authorization": "Bearer",
        "x-request-id": "\x7f",
    }
    assert served.ask("POST", "/v1/chat/completions", body, headers).status == 200


def test_long_texts(serve: Serve) -> None:
    served, size = serve(), 2**18
    for text in ("a" * size, "\U0001f600" * (size // 4), " " * size, "\u0301" * (size // 2), "<" * size):
        for path, key in (
            ("/v1/chat/completions", "messages"),
            ("/v1/completions", "prompt"),
            ("/tokenize", "content"),
        ):
            value: Any = [{"role": "user", "content": text}] if key == "messages" else text
            reply = served.post(path, {key: value, "max_tokens": 1})
            assert reply.status in (200, 400), reply.text[:200]
