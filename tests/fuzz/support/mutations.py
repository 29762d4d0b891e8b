"""Deterministic damage: to bytes of any kind, to JSON, and to GGUF by its parts."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

BOUNDARIES = (
    0, 1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 4095, 4096, 65535, 65536,
    (1 << 21) - 1, 1 << 21, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, "", "..", "../x", "/etc/passwd", "a\0b", "x" * 300, 0.0, -0.0, 1e308, 1.5, -1,
    [], {}, [[]], [{}], "\ud800", float("nan"), float("inf"), 10**25, *BOUNDARIES,
)  # fmt: skip
MAX_INPUT_BYTES = 1 << 16


def mutate_bytes(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    """One to four changes that know nothing of the format."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(result, pool, rng)
    return bytes(result[:MAX_INPUT_BYTES])


def _change(data: bytearray, pool: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 4, 8, 16, 64))
    match rng.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        case 5:
            data[at:at] = rng.randbytes(length)
        case 6:
            size = rng.choice((1, 2, 4, 8))
            value = (rng.choice(BOUNDARIES) + rng.choice((-1, 0, 0, 1))) % (1 << 8 * size)
            data[at : at + size] = value.to_bytes(size, "little")
        case _:
            other = rng.choice(pool)
            start = rng.randrange(len(other) + 1)
            data[at : at + rng.choice((0, length))] = other[start : start + rng.choice((length, 500))]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three nodes replaced, removed, repeated, renamed or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(value)
        if not places:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("extra", "", "\x00", str(key) * 2, "__metadata__"))] = copy.deepcopy(
                    parent[key]
                )
            case 2 if isinstance(parent, list):
                parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
            case 3:
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
            case 4:
                other_parent, other_key = rng.choice(places)
                parent[key] = copy.deepcopy(other_parent[other_key]) if len(str(other_parent)) < 5000 else 0
            case _:
                old = parent[key]
                is_number = isinstance(old, int) and rng.random() < 0.5
                parent[key] = (
                    old + rng.choice((-1, 1, 8, 4096, -4096))
                    if is_number
                    else copy.deepcopy(rng.choice(ODD_VALUES))
                )
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below the root."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        item = stack.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            stack.append(item[key])
    return found


def encode_json(value: Any, rng: random.Random) -> bytes:
    """Text of a JSON value, sometimes with a key twice or brackets gone wild."""
    text = json.dumps(value).encode()
    if rng.random() < 0.03:
        text = text.replace(b"{", b'{"a":1,"a":2,', 1)
    if rng.random() < 0.02:
        text = text.replace(b"[", b"[" * rng.choice((10, 40, 5000)), 1)
    return text


def gguf_integer_places(data: bytes) -> list[int]:
    """Where a length, count, type or offset is likely to be."""
    places = [4, 8, 16]
    places += [
        at
        for at in range(24, min(len(data), 4000))
        if data[at : at + 8] < b"\xff" and not any(data[at + 2 : at + 8])
    ]
    return places


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """Boundary values where the header has its lengths, counts, types and offsets."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(gguf_integer_places(data))
        form, bits = rng.choice((("<Q", 64), ("<I", 32), ("<B", 8)))
        if at + bits // 8 <= len(result):
            old = struct.unpack_from(form, result, at)[0]
            new = rng.choice((rng.choice(BOUNDARIES), old + 1, old - 1, old * 2, old ^ 1, rng.randrange(64)))
            struct.pack_into(form, result, at, new % (1 << bits))
    return bytes(result)
