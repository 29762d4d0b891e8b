"""Which tools a request offers, and whether one must be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krasis.formats.names import shown
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.tools.calls import Tools, function_of

MAX_TOOLS = 1024


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """tools: in OpenAI's form. kind: ``none``, ``auto``, ``required``. name: of the one that must be
    called."""

    tools: Tools = ()
    kind: str = "auto"
    name: str = ""

    @classmethod
    def checked(cls, tools: Tools, kind: str, name: str = "") -> ToolChoice:
        """Raises ApiError for a choice that the tools do not allow."""
        if len(tools) > MAX_TOOLS:
            raise refused(f"There are more than {MAX_TOOLS} tools.", "tools")
        if kind == "required" and not tools:
            raise refused("'tool_choice' asks for a call, but there are no tools.", "tool_choice")
        if name and all(function_of(tool).get("name") != name for tool in tools):
            raise refused(
                f"'tool_choice' names a tool that is not offered (got {shown(name)}).", "tool_choice"
            )
        return cls(tools, kind if tools else "none", name)

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for in the answer."""
        return self.kind != "none"

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.kind == "required"

    @property
    def callable_tools(self) -> Tools:
        """The tools that may be called."""
        if not self.name:
            return self.tools
        return [tool for tool in self.tools if function_of(tool).get("name") == self.name]


def read_tools(fields: Fields) -> ToolChoice:
    """OpenAI's ``tools`` and ``tool_choice``, of chat and of responses. Kinds of tools that only their
    provider can run are left out.

    Raises ApiError.
    """
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(fields.items("tools") or ()):
        where = f"tools[{number}]"
        if not isinstance(tool, Mapping):
            raise refused(f"'{where}' must be an object.", where)
        if tool.get("type", "function") == "namespace":
            tools += [_function(one, where) for one in _objects(tool.get("tools"))]
        elif tool.get("type", "function") == "function":
            tools.append(_function(tool, where))
    return _with_choice(fields, tools)


def _function(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One tool in chat's form. responses has name and parameters beside the type."""
    function = function_of(tool)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name or len(name) > 256:
        raise refused(f"'{where}.function.name' must be a string of 1 to 256 characters.", where)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise refused(f"'{where}.function.parameters' must be an object.", where)
    kept: dict[str, Any] = {"name": name}
    if isinstance(function.get("description"), str):
        kept["description"] = function["description"]
    kept["parameters"] = dict(parameters) if parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": kept}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects in a list; nothing in what is no list."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _with_choice(fields: Fields, tools: list[dict[str, Any]]) -> ToolChoice:
    choice = fields.any("tool_choice")
    if choice is None or choice in ("auto", "none", "required"):
        return ToolChoice.checked(tools, choice or "auto")
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            inner = choice.get("allowed_tools")
            allowed = inner if isinstance(inner, Mapping) else choice
            names = [function_of(one).get("name") for one in _objects(allowed.get("tools"))]
            few = [tool for tool in tools if function_of(tool).get("name") in names]
            return ToolChoice.checked(few, "required" if allowed.get("mode") == "required" else "auto")
        name = function_of(choice).get("name")
        if choice.get("type") == "function" and isinstance(name, str) and name:
            return ToolChoice.checked(tools, "required", name)
        if choice.get("type") in ("auto", "none", "required"):
            return ToolChoice.checked(tools, str(choice["type"]))
    raise refused(
        f"'tool_choice' must be none, auto, required or name a function (got {shown(choice)}).", "tool_choice"
    )
