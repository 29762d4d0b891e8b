"""Checkpoint indexes that lie."""

import json
import os

import pytest
from format_builders import safetensors, tensor_entry

from krasis.formats.checkpoints.safetensors import ShardedCheckpoint

INDEX = "model.safetensors.index.json"
SHARD = safetensors({"w": tensor_entry("U8", [4], 0, 4)}, b"data")


def index(weight_map):
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


CASES = {
    "index_without_weight_map": (b'{"metadata": {}}', ["no weight_map"]),
    "index_with_empty_weight_map": (index({}), ["no weight_map"]),
    "index_is_a_list": (b"[]", ["must be an object"]),
    "index_names_a_parent_directory": (
        index({"w": "../secret.safetensors"}),
        ["not a plain name", "'../secret.safetensors'"],
    ),
    "index_names_an_absolute_path": (index({"w": "/etc/passwd"}), ["not a plain name", "'/etc/passwd'"]),
    "index_names_a_nul": (index({"w": "a\0.safetensors"}), ["control characters"]),
    "index_names_a_dot": (index({"w": ".."}), ["not a plain name"]),
    "index_names_an_endless_file_name": (index({"w": "x" * 100_000}), ["too long"]),
    "index_names_a_number": (index({"w": 7}), ["must be text"]),
    "index_names_a_missing_shard": (index({"w": "gone.safetensors"}), ["'gone.safetensors' is missing"]),
    "index_names_a_missing_tensor": (
        index({"w": "one.safetensors", "ghost": "one.safetensors"}),
        ["'ghost'", "does not have"],
    ),
    "index_names_a_tensor_twice": (
        b'{"weight_map": {"w": "one.safetensors", "w": "two.safetensors"}}',
        ["'w' occurs twice"],
    ),
    "index_nested_too_deeply": (b'{"weight_map":' + b'{"a":' * 100_000, ["nested too deeply"]),
}


@pytest.mark.parametrize("case", CASES)
def test_lying_indexes(case, put, refuses, tmp_path):
    data, parts = CASES[case]
    put("one.safetensors", SHARD)
    two = {"v": tensor_entry("U8", [2], 0, 2), "u": tensor_entry("U8", [2], 2, 4)}
    put("two.safetensors", safetensors(two, b"data"))
    put(INDEX, data)
    refuses(lambda: ShardedCheckpoint.open(tmp_path), *parts, header_bytes=len(data))


def test_index_names_a_fifo(put, refuses, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    put(INDEX, index({"w": "pipe.safetensors"}))
    refuses(lambda: ShardedCheckpoint.open(tmp_path), "not a regular file", "FIFO", header_bytes=100)


def test_index_names_a_directory(put, refuses, tmp_path):
    (tmp_path / "dir.safetensors").mkdir()
    put(INDEX, index({"w": "dir.safetensors"}))
    refuses(lambda: ShardedCheckpoint.open(tmp_path), "not a regular file", "directory", header_bytes=100)


def test_index_names_a_link_to_a_device(put, refuses, tmp_path):
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    put(INDEX, index({"w": "zero.safetensors"}))
    refuses(lambda: ShardedCheckpoint.open(tmp_path), "not a regular file", "device", header_bytes=100)
