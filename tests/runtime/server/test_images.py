"""Images, which no model here can see: one clear refusal, on every API."""

from __future__ import annotations

from typing import Any

import pytest

from krasis.runtime.server.images import NOTE

from .conftest import Serve

URL = "data:image/png;base64,aGk="
CHAT: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
RESPONSES: dict[str, Any] = {"type": "input_image", "image_url": URL}
MESSAGES: dict[str, Any] = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "aGk="},
}


def said(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts]}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": said({"type": "text", "text": "What?"}, CHAT)}),
        ("/v1/responses", {"input": said({"type": "input_text", "text": "What?"}, RESPONSES)}),
        ("/v1/messages", {"max_tokens": 9, "messages": said({"type": "text", "text": "What?"}, MESSAGES)}),
        ("/api/chat", {"messages": [{"role": "user", "content": "What?", "images": ["aGk="]}]}),
    ],
)
def test_an_image_is_refused_before_anything_is_sent(
    serve: Serve, path: str, body: Any, stream: bool
) -> None:
    served = serve()
    reply = served.post(path, {"model": "tiny", **body, "stream": stream})
    assert reply.status == 400
    error = reply.json["error"]
    message = error if isinstance(error, str) else error["message"]
    assert "this model reads text only" in message
    assert "image" in message
    assert URL not in message
    assert not served.core.requests


@pytest.mark.parametrize("part", [CHAT, RESPONSES, MESSAGES])
def test_an_image_that_a_tool_has_given_is_a_note(serve: Serve, qwen3_template: str, part: Any) -> None:
    served = serve(template=qwen3_template)
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    rows = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "Here"}, part]},
    ]
    assert served.post("/v1/chat/completions", {"messages": rows}).status == 200
    items = [
        {"role": "user", "content": "What?"},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_text", "text": "Here"}, part],
        },
    ]
    assert served.post("/v1/responses", {"input": items}).status == 200
    for request in served.core.requests:
        assert NOTE in served.core.assets.tokenizer.decode(request.prompt)
