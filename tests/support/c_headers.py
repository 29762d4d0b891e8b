"""The C headers of csrc as text, for comparing their words with Python's."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def header_text(name: str, without: frozenset[str] = frozenset()) -> str:
    """A header of csrc and those of csrc that it includes, each once, without comments."""
    seen = set(without)

    def read(one: str) -> str:
        if one in seen:
            return ""
        seen.add(one)
        text = re.sub(r"/\*.*?\*/", " ", (CSRC / one).read_text(), flags=re.S)
        return re.sub(r'#include "(\w+\.h)"', lambda found: read(found[1]), text)

    return read(name)
