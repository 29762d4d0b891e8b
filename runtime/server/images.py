"""Images that clients send: this program's models read text only.

One in a user's message is refused. One that a tool has given becomes a note: it stands in the conversation
from there on, and refusing it would end the conversation for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = "(an image, which this model cannot see)"
_KINDS = ("image", "image_url", "input_image")


def with_notes(content: Any) -> Any:
    """A tool's result in parts, with notes in the place of images."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": NOTE} if is_image(part) else part for part in content]


def is_image(part: object) -> bool:
    """Whether a part of content is an image, of whichever API."""
    return isinstance(part, Mapping) and part.get("type") in _KINDS
