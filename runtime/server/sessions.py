"""Which conversation a request belongs to, and whether it is a question beside it.

Agents and pages ask for titles, tags and follow-ups with another prompt; such a prompt must not push the
conversation itself out of its slot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

# By which agents name a conversation.
HEADERS = ("x-claude-code-session-id", "x-session-id", "session-id", "x-session-affinity")
MAX_NAME_CHARACTERS = 256
MAX_SESSIONS = 4096
_TASK = "### Task:"  # Open WebUI's prompts for titles, tags and the like


class Sessions:
    """Remembers which conversations use tools."""

    def __init__(self) -> None:
        self._with_tools: OrderedDict[str, bool] = OrderedDict()

    def is_side(self, session: str, *, has_tools: bool, is_task: bool) -> bool:
        """Whether a request is a question beside the conversation: one without tools in a conversation that
        has them, or one that says so."""
        if not session:
            return is_task and not has_tools
        had_tools = self._with_tools.get(session, False)
        self._with_tools[session] = had_tools or has_tools
        self._with_tools.move_to_end(session)
        if len(self._with_tools) > MAX_SESSIONS:
            self._with_tools.popitem(last=False)
        return not has_tools and (had_tools or is_task)


def name_of(headers: Mapping[str, str], otherwise: str) -> str:
    """The conversation's name, empty without one."""
    found = next((value for one in HEADERS if (value := headers.get(one))), otherwise)
    return found[:MAX_NAME_CHARACTERS]


def is_task(messages: object) -> bool:
    """Whether the last message is a page's question about the conversation."""
    last: Any = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, Mapping) else None
    return isinstance(content, str) and content.startswith(_TASK)
