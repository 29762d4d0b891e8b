"""What passes between a worker and its owner, and is imported by both: a request, and its answer.

request   operation (16 bytes, zeros at the end), seconds of CPU (f64), bytes of memory (u64),
          bytes that follow (u64), payload
answer    status (u8: 0 done, 1 refused, 2 out of memory), bytes that follow (u64), payload
"""

from __future__ import annotations

import json
import struct
from typing import Any

REQUEST = struct.Struct("<16sdQQ")
ANSWER = struct.Struct("<BQ")
DONE, REFUSED, OUT_OF_MEMORY = 0, 1, 2
MAX_REFUSAL_BYTES = 64 * 1024
# An operation whose name begins with it keeps something for later ones.
KEEPING = "load"
_LENGTH = struct.Struct("<Q")


def pack_parts(head: Any, *parts: bytes) -> bytes:
    """A payload: a JSON value and byte strings. ValueError or TypeError for a value that is not JSON's."""
    text = json.dumps(head).encode("ascii")
    return b"".join([_LENGTH.pack(len(text)), text, *(_LENGTH.pack(len(p)) + p for p in parts)])


def unpack_parts(payload: bytes) -> tuple[Any, list[memoryview]]:
    """Inverts ``pack_parts``. ValueError for a payload that is not one."""
    view = memoryview(payload)
    pieces: list[memoryview] = []
    while view:
        if len(view) < _LENGTH.size:
            raise ValueError("a part is cut short")
        (size,) = _LENGTH.unpack(view[: _LENGTH.size])
        piece, view = view[_LENGTH.size : _LENGTH.size + size], view[_LENGTH.size + size :]
        if len(piece) != size:
            raise ValueError("a part is cut short")
        pieces.append(piece)
    if not pieces:
        raise ValueError("nothing is there")
    return json.loads(str(pieces[0], "ascii")), pieces[1:]
