"""The object of a response as it grows, and the events that say how."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from krasis.runtime.server.ask import Ask
from krasis.runtime.server.errors import ApiError
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.response_items import hidden_thoughts
from krasis.runtime.server.tools.calls import Call, Text
from krasis.runtime.server.turn import End, Making, Step, Turn
from krasis.runtime.server.usage import responses_usage, timings, timings_while
from krasis.runtime.text.thinking import REASONING

Item = dict[str, Any]

_ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "tool_choice": "auto",
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}


class ResponseObject:
    """A response, in progress until it ends."""

    def __init__(self, fields: Fields, ask: Ask) -> None:
        self.number = ask.number("resp_")
        self.output: list[Item] = []
        self._created = int(time.time())
        self._fixed = {
            key: default if fields.any(key) is None else fields.any(key) for key, default in _ECHOED.items()
        }
        if self._fixed["service_tier"] == "auto":
            self._fixed["service_tier"] = "default"
        self._fixed |= {
            "model": ask.model,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "presence_penalty": ask.sampling.presence_penalty,
            "frequency_penalty": ask.sampling.frequency_penalty,
            "tools": [_tool(tool) for tool in ask.choice.tools],
            "text": _text_of(fields),
            "reasoning": _reasoning_of(fields),
            "store": False,
            "background": False,
            "previous_response_id": None,
        }
        self._state: dict[str, Any] = {
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "completed_at": None,
        }

    @property
    def is_summarised(self) -> bool:
        """Whether a summary of the thoughts is wanted."""
        return bool(self._fixed["reasoning"]["summary"])

    def shown(self) -> dict[str, Any]:
        """The object as it is now."""
        return {
            "id": self.number,
            "object": "response",
            "created_at": self._created,
            **self._fixed,
            **self._state,
            "output": list(self.output),
        }

    def ended(self, end: End) -> str:
        """Takes the end; gives the name of its event."""
        cut = end.reason == "length"
        self._state |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": responses_usage(end),
            "completed_at": int(time.time()),
        }
        return "response.incomplete" if cut else "response.completed"

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The object of a response that ended with an error."""
        code = error.code or ("server_error" if error.status >= 500 else "invalid_prompt")
        self._state |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self.shown()


class Writer:
    """Adds steps to a response, and gives the events."""

    def __init__(
        self, answer: ResponseObject, turn: Turn, *, progress: bool = False, has_timings: bool = False
    ) -> None:
        """progress, has_timings: llama.cpp's ``return_progress`` and ``timings_per_token``."""
        self._answer, self._turn = answer, turn
        self._progress, self._timings = progress, has_timings
        self._item: Item | None = None

    def step(self, step: Step) -> Iterator[dict[str, Any]]:
        """The events of one step."""
        if isinstance(step, Text):
            yield from self._begin("reasoning" if step.kind == REASONING else "message")
            yield from self._text(step.text)
        elif isinstance(step, Call):
            yield from self._end_item("completed")
            yield from self._call(step)
        elif isinstance(step, Making) and self._progress:
            shown = {"type": "response.in_progress", "response": self._answer.shown()}
            more = {"timings": timings_while(step)} if self._timings else {}
            yield {**shown, "prompt_progress": step.llama_cpp(), **more}
        elif isinstance(step, End):
            if self._item is None and not self._answer.output:
                yield from self._begin("message")
            yield from self._end_item("incomplete" if step.reason == "length" else "completed")
            name = self._answer.ended(step)
            more = {"timings": timings(step)} if self._timings else {}
            yield {"type": name, "response": self._answer.shown(), **more}

    @property
    def _index(self) -> int:
        return len(self._answer.output) - 1

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        if self._item is not None and self._item["type"] == kind:
            return
        yield from self._end_item("completed")
        number = self._turn.ask.number("rs_" if kind == "reasoning" else "msg_")
        item: Item = {"id": number, "type": kind, "status": "in_progress", "content": []}
        more: Item = (
            {"summary": [], "encrypted_content": None} if kind == "reasoning" else {"role": "assistant"}
        )
        item |= more
        self._answer.output.append(item)
        self._item = item
        yield {
            "type": "response.output_item.added",
            "output_index": self._index,
            "item": {**item, "content": []},
        }
        part = _part(kind)
        item["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "part": dict(part)}
        if kind == "reasoning" and self._answer.is_summarised:
            yield self._summary("part.added", part={"type": "summary_text", "text": ""})

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        item = self._item
        if item is None:
            return
        item["content"][0]["text"] += text
        if item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.delta", **self._place(), "delta": text}
            if self._answer.is_summarised:
                yield self._summary("text.delta", delta=text)
        else:
            more = {"timings": timings(self._turn.so_far())} if self._timings else {}
            delta = {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": []}
            yield {**delta, **more}

    def _end_item(self, status: str) -> Iterator[dict[str, Any]]:
        item = self._item
        if item is None:
            return
        part = item["content"][0]
        if item["type"] == "reasoning":
            item["encrypted_content"] = hidden_thoughts(part["text"])
            yield {"type": "response.reasoning_text.done", **self._place(), "text": part["text"]}
            if self._answer.is_summarised:
                item["summary"] = [{"type": "summary_text", "text": part["text"]}]
                yield self._summary("text.done", text=part["text"])
                yield self._summary("part.done", part=dict(item["summary"][0]))
        else:
            yield {"type": "response.output_text.done", **self._place(), "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **self._place(), "part": dict(part)}
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": self._index, "item": dict(item)}
        self._item = None

    def _call(self, call: Call) -> Iterator[dict[str, Any]]:
        item: Item = {
            "id": self._turn.ask.number("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": self._turn.remember(call),
            "name": call.name,
            "arguments": "",
        }
        self._answer.output.append(item)
        place = {"item_id": item["id"], "output_index": self._index}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": dict(item)}
        kind = "response.function_call_arguments"
        yield {"type": f"{kind}.delta", **place, "delta": call.arguments}
        yield {"type": f"{kind}.done", **place, "arguments": call.arguments, "name": call.name}
        item |= {"status": "completed", "arguments": call.arguments}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": dict(item)}

    def _summary(self, kind: str, **more: Any) -> dict[str, Any]:
        """An event of the summary, which is the thoughts themselves: Codex shows nothing else."""
        place = self._place()
        del place["content_index"]
        return {"type": f"response.reasoning_summary_{kind}", **place, "summary_index": 0, **more}

    def _place(self) -> dict[str, Any]:
        number = "" if self._item is None else self._item["id"]
        return {"item_id": number, "output_index": self._index, "content_index": 0}


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _tool(tool: Any) -> dict[str, Any]:
    function = tool["function"]
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": False,
    }


def _text_of(fields: Fields) -> dict[str, Any]:
    text = fields.mapping("text") or {}
    return {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"}


def _reasoning_of(fields: Fields) -> dict[str, Any]:
    reasoning = fields.mapping("reasoning") or {}
    return {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")}
