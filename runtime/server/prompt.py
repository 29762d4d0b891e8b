"""From a conversation as clients send it to the prompt's text and tokens.

The strict readers and the template's own quirks are ``runtime.messages``' matter. Here is what a server adds:
the forms in which agents send things that a template refuses, so that their next turn can be answered too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from krasis.formats.errors import FormatError, KrasisError, UsageError
from krasis.runtime.server.continuing import check_begun, text_to_go_on
from krasis.runtime.server.errors import ApiError, from_krasis, refused, too_long
from krasis.runtime.server.images import with_notes
from krasis.runtime.server.tools.calls import CallFormat, NotJsonError, Tools, strict_json
from krasis.runtime.server.tools.known import format_of
from krasis.runtime.server.tools.one_each import one_call_each, writes_several
from krasis.runtime.server.tools.own_ids import with_own_ids
from krasis.runtime.server.tools.plain import with_description, with_written_calls, without_tools
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.template_values import check_variables
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.chat import ChatTemplate
from krasis.runtime.text.messages import read_messages, render_chat
from krasis.runtime.text.template_variables import names_offered, names_read, think_variables

Row = dict[str, Any]

MAX_MESSAGES = 20_000
# A token stands for so many bytes at most, on average over a prompt that fits: what is longer is refused
# unread.
MAX_BYTES_PER_TOKEN = 64


class Prompts:
    """Renders and tokenizes for one model. context: tokens of one conversation. Any thread may call.

    variables: what every conversation's template is told.
    """

    def __init__(
        self, assets: TextAssets, context: int, replay: Replay, variables: Mapping[str, object] | None = None
    ) -> None:
        self.assets, self.context = assets, context
        self._replay = replay
        self._variables = dict(variables or {})

    @property
    def source(self) -> str:
        """The template's text, empty without one."""
        return "" if self.assets.template is None else self.assets.template.source

    @cached_property
    def call_format(self) -> CallFormat:
        """How the model writes calls of tools: as its template does."""
        tokenizer = self.assets.tokenizer
        return format_of(self.source, lambda token: tokenizer.token_id(token) is not None)

    def text(
        self,
        messages: object,
        tools: Tools = (),
        *,
        think: bool | None = None,
        variables: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        goes_on: bool = False,
    ) -> str:
        """The prompt of a conversation. think: asks for thinking, or for none, where the template can.
        goes_on: the answer goes on with the last message, which is the assistant's, instead of a new one.

        Raises ApiError.
        """
        template = self.assets.template
        if template is None:
            raise refused("This model has no chat template; use /v1/completions.", "messages")
        if not isinstance(messages, list) or not messages:
            raise refused("'messages' must be a list of at least one message.", "messages")
        if len(messages) > MAX_MESSAGES:
            raise refused(f"There are more than {MAX_MESSAGES} messages.", "messages")
        try:
            given = self._given(think, variables)
            sent = rows = read_messages([_filled(one) for one in messages])
            if goes_on:
                check_begun(rows)
            rows, shown_tools = self._fitted(template, rows, tools)
            if goes_on:
                text = text_to_go_on(
                    rows, lambda marked: _render(template, marked, shown_tools, given, False)
                )
            else:
                text = _render(template, rows, shown_tools, given, add_generation_prompt)
        except KrasisError as error:
            raise from_krasis(error, "messages") from error
        return self._replay.restored(text, sent, self.call_format, tools)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Its ids. Raises ApiError, also for a text that is far too long to be tokenized at all."""
        if len(text) > self.context * MAX_BYTES_PER_TOKEN:
            raise too_long(len(text) // 4, self.context)
        try:
            return self.assets.tokenizer.encode(text, special=special)
        except KrasisError as error:
            raise from_krasis(error) from error

    def checked(self, tokens: Sequence[int], field: str = "messages") -> list[int]:
        """A prompt's tokens, if there are any and the context has room for one more. field: of the request,
        where it came from. Raises ApiError."""
        if not tokens:
            raise refused("The prompt is empty.", field)
        if len(tokens) >= self.context:
            raise too_long(len(tokens), self.context)
        return list(tokens)

    def _fitted(self, template: ChatTemplate, rows: list[Row], tools: Tools) -> tuple[list[Row], Tools]:
        """Messages and tools as the template can write them."""
        form, has_tools = self.call_format, "tools" in self.source
        if "tool_calls" not in self.source:
            if has_tools and form.write is not None:
                return with_written_calls(rows, form.write), tools
            return without_tools(rows, tools), ()
        if form.ids:
            rows = with_own_ids(rows, form.ids, self._replay.find)
        if any(len(row.get("tool_calls") or ()) > 1 for row in rows) and not writes_several(template):
            rows = one_call_each(rows)
        return (rows, tools) if has_tools else (with_description(rows, tools, form), ())

    def _given(self, think: bool | None, variables: Mapping[str, object] | None) -> dict[str, object]:
        check_variables(variables or {})
        given: dict[str, object] = {}
        if "preserve_thinking" in names_offered(self.source):
            given["preserve_thinking"] = True  # or each turn changes the prompt that was computed before
        given |= self._variables
        given |= think_variables(think, names_read(self.source))
        return given | dict(variables or {})


def _render(
    template: ChatTemplate, rows: list[Row], tools: Tools, variables: Mapping[str, object], generate: bool
) -> str:
    """The first form of the messages that the template takes; else what it says of the first."""
    failure: KrasisError | None = None
    for attempt in _forms(rows, template.source):
        try:
            return render_chat(
                template,
                attempt,
                tools=list(tools) or None,
                variables=variables,
                add_generation_prompt=generate,
            )
        except (FormatError, UsageError) as error:
            failure = failure or error
    raise failure if failure is not None else UsageError("there are no messages")


def _filled(message: object) -> object:
    """A message without content has an empty one: agents send null beside calls, thoughts and nothing."""
    if not isinstance(message, Mapping):
        return message
    if message.get("content") is None:
        return {**message, "content": ""}
    return (
        {**message, "content": with_notes(message["content"])} if message.get("role") == "tool" else message
    )


def _forms(rows: list[Row], source: str) -> Iterator[list[Row]]:
    """The messages as they are, and with the same meaning in other forms."""
    if "developer" not in source:  # some templates drop such messages without a word
        rows = [{**row, "role": "system"} if row["role"] == "developer" else row for row in rows]
    yield rows
    readable = [_with_objects(row) for row in rows]
    if readable != rows:
        yield readable
    merged = _one_system(readable)
    if merged != readable:
        yield merged
        moved = _system_to_user(merged)
        if moved != merged:
            yield moved
    elif any(row["role"] == "system" for row in rows[1:]):
        yield _system_to_user(readable)


def _with_objects(row: Row) -> Row:
    """A model may have written arguments that are no JSON object. They stay readable, as text in one."""
    calls = row.get("tool_calls")
    if not calls:
        return row
    return {**row, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Row) -> Row:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or not arguments.strip():
        return call
    try:
        if isinstance(strict_json(arguments), dict):
            return call
    except NotJsonError:
        pass
    changed = {**function, "arguments": {"arguments": arguments}}
    return {**call, "function": changed} if "function" in call else changed


def _one_system(rows: list[Row]) -> list[Row]:
    """The system messages that the conversation begins with, as one."""
    count = next((at for at, row in enumerate(rows) if row["role"] != "system"), len(rows))
    if count < 2:
        return rows
    return [{"role": "system", "content": "\n\n".join(_words(row) for row in rows[:count])}, *rows[count:]]


def _system_to_user(rows: list[Row]) -> list[Row]:
    """System messages after the first become the user's words: what came before stays as it was."""
    moved: list[Row] = []
    for index, row in enumerate(rows):
        if index and row["role"] == "system":
            if moved[-1]["role"] == "user":
                moved[-1] = {**moved[-1], "content": f"{_words(moved[-1])}\n\n{_words(row)}"}
            else:
                moved.append({"role": "user", "content": _words(row), "_moved": True})
        elif row["role"] == "user" and moved and moved[-1].get("_moved"):
            moved[-1] = {"role": "user", "content": f"{_words(moved[-1])}\n\n{_words(row)}"}
        else:
            moved.append(row)
    return [{key: value for key, value in row.items() if key != "_moved"} for row in moved]


def _words(row: Row) -> str:
    content = row.get("content", "")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


__all__ = ["ApiError", "Prompts"]
