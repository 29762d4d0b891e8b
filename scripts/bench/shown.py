"""Commands as a reader can use them: without the places of the machine that they ran on."""

from __future__ import annotations

import re

_ABSOLUTE = re.compile(r"(?<![\w.~/-])/(?!proc/|sys/|dev/(?!shm/))(?:[\w.+@%-]+/)+(?P<name>[\w.+@%-]+)")
_IN_REPOSITORY = re.compile(r"(?:^|/)((?:scripts|tests|docs|examples)/.*)$")


def without_places(text: str) -> str:
    """The text with every absolute path cut to what says something: its name, or the path in this
    repository.
    """

    def shorten(match: re.Match[str]) -> str:
        inside = _IN_REPOSITORY.search(match.group(0))
        return inside.group(1) if inside else match.group("name")

    return _ABSOLUTE.sub(shorten, text)
