"""Edits of a bundle that leave every checksum true: what is then noticed is the lie itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The JSON record."""
    return json.loads((bundle / "manifest.json").read_text())


def write_manifest(bundle: Path, record: dict[str, Any]) -> None:
    """Canonical, checksum true."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    dump = lambda value: json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"  # noqa: E731
    (bundle / "manifest.json").write_bytes(dump(body | {"checksum": xxhash.xxh3_128_hexdigest(dump(body))}))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the record in place."""
    record = read_manifest(bundle)
    edit(record)
    write_manifest(bundle, record)


def edit_shard_header(bundle: Path, name: str, edit: Callable[[dict[str, Any]], bytes | None]) -> None:
    """Replaces the JSON of a shard's header; length, padding and digest stay true."""
    path = bundle / name
    data = path.read_bytes()
    record = read_manifest(bundle)
    entry = next(file for file in record["files"] if file["name"] == name)
    size = entry["header_bytes"]
    header = json.loads(data[8:size])
    text = edit(header)
    text = (json.dumps(header).encode() if text is None else text).ljust(size - 8)
    new = struct.pack("<Q", len(text)) + text
    path.write_bytes(new[:size] + data[size:])
    entry["header_xxh3_128"] = xxhash.xxh3_128_hexdigest(new[:size])
    write_manifest(bundle, record)


def header_bytes(bundle: Path) -> int:
    """Bytes of all headers: what opening may read."""
    return (bundle / "manifest.json").stat().st_size + 3 * (2 << 20)
