"""GET /openapi.json: what can be asked, for programs that read OpenAPI 3.1.

It says what the readers of requests accept, in outline: the APIs' own descriptions have the details, and
fields that are not named here are ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from krasis.formats.process.tool import tool_version
from krasis.runtime.server.service import service_of
from krasis.runtime.server.wire import json_response

Schema = dict[str, Any]


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _whole(low: int, high: int = 2**53) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _list_of(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT: Schema = {"type": "string"}
_WORDS: Schema = {"type": ["string", "null"]}
_FLAG: Schema = {"type": ["boolean", "null"]}
_ANY_OBJECT: Schema = {"type": ["object", "null"]}
_ID: Schema = {"type": "integer", "minimum": 0}
_STOPS: Schema = {"anyOf": [_WORDS, _list_of(_TEXT)]}
_PARTS: Schema = {"anyOf": [_WORDS, _list_of(_object({"type": _TEXT, "text": _TEXT}, "type", "text"))]}
_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-100, 100),
    "frequency_penalty": _number(-100, 100),
    "repetition_penalty": _number(0.01, 100),
    "seed": {"type": ["integer", "null"]},
}
_SHARED: dict[str, Schema] = {
    **_SAMPLING,
    "model": _WORDS,
    "max_tokens": _whole(1),
    "stream": _FLAG,
    "stop": _STOPS,
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
    "n": _whole(1, 128),
    "response_format": _ANY_OBJECT,
    "id_slot": _whole(-1, 63),
}
_FUNCTION = _object({"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}}, "name")
_TOOLS = _list_of(_object({"type": {"const": "function"}, "function": _FUNCTION}, "type", "function"))
_ROLES = ["system", "developer", "user", "assistant", "tool"]
_MESSAGE = _object({"role": {"enum": _ROLES}, "content": _PARTS, "tool_call_id": _WORDS}, "role")
_TEMPLATE: dict[str, Schema] = {
    "messages": _list_of(_MESSAGE, 1),
    "tools": {"anyOf": [_TOOLS, {"type": "null"}]},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, _ANY_OBJECT]},
    "chat_template_kwargs": _ANY_OBJECT,
    "reasoning_effort": _WORDS,
    "add_generation_prompt": _FLAG,
    "continue_final_message": _FLAG,
}
_CHAT = {
    **_SHARED,
    **_TEMPLATE,
    "max_completion_tokens": _whole(1),
    "logprobs": _FLAG,
    "top_logprobs": _whole(0, 20),
    "stream_options": _ANY_OBJECT,
    "reasoning_format": {"enum": ["auto", "none", "deepseek", "deepseek-legacy", None]},
    "return_progress": _FLAG,
    "timings_per_token": _FLAG,
    "verbose": _FLAG,
}
_PROMPT: Schema = {"anyOf": [_TEXT, _list_of(_TEXT, 1), _list_of(_ID, 1), _list_of(_list_of(_ID, 1), 1)]}
_COMPLETION = {**_SHARED, "prompt": _PROMPT, "echo": _FLAG, "logprobs": _whole(0, 20)}
_NATIVE = {
    **_SHARED,
    "prompt": {"anyOf": [_PROMPT, _object({"prompt_string": _TEXT}, "prompt_string")]},
    "n_predict": _whole(-1),
    "n_probs": _whole(0, 20),
    "cache_prompt": _FLAG,
    "return_tokens": _FLAG,
    "response_fields": _list_of(_TEXT),
}
_CLAUDE: dict[str, Schema] = {
    "model": _WORDS,
    "messages": _list_of(
        _object({"role": {"enum": ["user", "assistant"]}, "content": _PARTS}, "role", "content"), 1
    ),
    "system": _PARTS,
    "tools": _list_of(_object({"name": _TEXT, "input_schema": {"type": "object"}}, "name", "input_schema")),
    "tool_choice": _ANY_OBJECT,
    "thinking": _ANY_OBJECT,
}
_MESSAGES = {
    **_CLAUDE,
    "max_tokens": _whole(1),
    "stream": _FLAG,
    "stop_sequences": _list_of(_TEXT),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**31 - 1),
}
_ITEM = _object({"role": {"enum": _ROLES[:4]}, "content": _PARTS}, "role")
_RESPONSES_TOOL = _object({"type": _TEXT, "name": _TEXT, "parameters": {"type": "object"}}, "type", "name")
_RESPONSES = {
    **_SAMPLING,
    "model": _WORDS,
    "input": {"anyOf": [_TEXT, _list_of(_ITEM, 1)]},
    "instructions": _WORDS,
    "max_output_tokens": _whole(1),
    "stream": _FLAG,
    "tools": _list_of(_RESPONSES_TOOL),
    "tool_choice": _TEMPLATE["tool_choice"],
    "reasoning": _ANY_OBJECT,
    "text": _ANY_OBJECT,
}
_FILE = {"filename": _TEXT}
_POSTS: dict[str, tuple[str, Schema]] = {
    "/v1/chat/completions": ("Answers a conversation.", _object(_CHAT, "messages")),
    "/v1/chat/completions/input_tokens": ("Counts its tokens.", _object(_TEMPLATE, "messages")),
    "/v1/completions": ("Goes on with a text.", _object(_COMPLETION, "prompt")),
    "/completion": ("Goes on with a text, in llama.cpp's form.", _object(_NATIVE, "prompt")),
    "/v1/messages": (
        "Answers a conversation, in Anthropic's form.",
        _object(_MESSAGES, "messages", "max_tokens"),
    ),
    "/v1/messages/count_tokens": ("Counts its tokens.", _object(_CLAUDE, "messages")),
    "/v1/responses": ("Answers, in the form of responses.", _object(_RESPONSES, "input")),
    "/v1/responses/input_tokens": ("Counts its tokens.", _object(_RESPONSES, "input")),
    "/tokenize": ("Gives a text's ids.", _object({"content": _TEXT, "with_pieces": _FLAG}, "content")),
    "/detokenize": ("Gives the text of ids.", _object({"tokens": _list_of(_ID)}, "tokens")),
    "/apply-template": ("Gives a conversation's prompt.", _object(_TEMPLATE, "messages")),
    "/slots/{number}": ("Saves, restores or erases a slot.", _object(_FILE)),
}
_GETS = {
    "/v1/models": "Lists the model.",
    "/v1/models/{name}": "Describes the model.",
    "/health": "Says whether requests are taken.",
    "/props": "Says how the server was started.",
    "/slots": "Says who uses what.",
    "/metrics": "Gives figures for Prometheus.",
}
_QUERY: list[Schema] = [
    {"name": "action", "in": "query", "required": True, "schema": {"enum": ["save", "restore", "erase"]}}
]
_PARAMETERS: dict[str, list[Schema]] = {
    "/slots/{number}": [{"name": "number", "in": "path", "required": True, "schema": _ID}, *_QUERY],
    "/v1/models/{name}": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}],
}
_REFUSALS = {
    "400": "The request cannot be served as it is.",
    "401": "The API key is wrong.",
    "408": "The request did not arrive in time.",
    "413": "The request is too large.",
    "429": "The queue is full.",
    "501": "The server does not offer this.",
    "503": "The model is loading, or the server is ending.",
}


def document(*, has_keys: bool, without: Collection[str] = ()) -> Schema:
    """The description. has_keys: a key must be given. without: paths that are switched off."""
    paths: dict[str, Schema] = {}
    for path, what in _GETS.items():
        paths.setdefault(path, {})["get"] = _operation(path, what)
    for path, (what, schema) in _POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(path, {})["post"] = {**_operation(path, what), "requestBody": body}
    for path in without:
        paths.pop(path, None)
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "krasis-serve", "version": tool_version()},
        "paths": paths,
        "components": {"securitySchemes": schemes},
        **({"security": [{"bearer": []}]} if has_keys else {}),
    }


def _operation(path: str, what: str) -> Schema:
    responses = {"200": {"description": "The answer; with 'stream' a stream of server-sent events."}}
    responses |= {status: {"description": words} for status, words in _REFUSALS.items()}
    if path == "/v1/models/{name}":
        responses["404"] = {"description": "There is no such model."}
    return {"summary": what, "parameters": _PARAMETERS.get(path, []), "responses": responses}


async def openapi(request: Request) -> Response:
    """The endpoint."""
    service = service_of(request)
    settings = service.settings
    without = [] if settings.slots else ["/slots", "/slots/{number}"]
    without += [] if service.slots is not None else ["/slots/{number}"]
    without += [] if settings.metrics else ["/metrics"]
    return json_response(document(has_keys=bool(settings.api_keys), without=without))
