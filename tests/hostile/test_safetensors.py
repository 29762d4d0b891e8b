"""Malformed safetensors headers, one a case."""

import struct

import pytest
from format_builders import safetensors, tensor_entry

from krasis.formats.checkpoints.safetensors import SafetensorsFile

ONE = {"w": tensor_entry("U8", [4], 0, 4)}


def entry(**changes):
    return {"w": tensor_entry("U8", [4], 0, 4) | changes}


CASES = {
    "empty_file": (b"", ["is empty", "the download failed"]),
    "file_of_seven_bytes": (b"1234567", ["too short", "got 7 bytes"]),
    "header_of_four_exabytes": (
        struct.pack("<Q", 1 << 62) + b"{}",
        ["header is too long", f"got {1 << 62}", "limit 100000000"],
    ),
    "header_length_with_all_bits_set": (b"\xff" * 8 + b"{}", ["header is too long"]),
    "header_longer_than_file": (
        safetensors(b"{}", length=5000),
        ["ends inside its header", "got 10 bytes", "5008"],
    ),
    "header_of_length_zero": (safetensors(b"", bytes(100)), ["must begin with '{'"]),
    "header_begins_with_space": (safetensors(b' {"w":1}'), ["must begin with '{'"]),
    "header_is_not_json": (safetensors(b"{nonsense"), ["not valid JSON"]),
    "header_is_not_utf8": (safetensors(b'{"\xff\xfe": 1}'), ["not UTF-8"]),
    "header_is_cut_json": (safetensors(b'{"w":{"dtype":"U8"'), ["not valid JSON"]),
    "json_a_million_levels_deep": (
        safetensors(b'{"w":' + b"[" * 1_000_000),
        ["nested too deeply", "limit 4"],
    ),
    "json_of_a_million_arrays": (safetensors(b'{"w":[' + b"[]," * 200_000), ["too many objects and arrays"]),
    "megabytes_of_backslashes": (safetensors(b'{"' + b"\\" * 3_000_001), ["not valid JSON"]),
    "tensor_named_twice": (
        safetensors(
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        ["'w' occurs twice"],
    ),
    "nan_as_a_size": (
        safetensors(b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
        ["NaN is not JSON"],
    ),
    "size_of_ten_thousand_digits": (
        safetensors(b'{"w":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"x"),
        ["exceeds 64 bits"],
    ),
    "sizes_whose_product_overflows": (
        safetensors({"w": tensor_entry("F32", [1 << 40, 1 << 40], 0, 4)}, bytes(4)),
        ["'w'", "overflows"],
    ),
    "overflow_hidden_by_a_zero": (
        safetensors({"w": tensor_entry("F32", [1 << 40, 1 << 40, 0], 0, 0)}),
        ["'w'", "overflows"],
    ),
    "negative_size": (safetensors(entry(shape=[-4]), bytes(4)), ["'w'", "shape", "-4"]),
    "size_is_true": (safetensors(entry(shape=[True]), bytes(4)), ["'w'", "shape"]),
    "size_is_a_fraction": (safetensors(entry(shape=[4.0]), bytes(4)), ["'w'", "shape"]),
    "shape_of_a_thousand_sizes": (safetensors(entry(shape=[1] * 1000), bytes(4)), ["'w'", "shape", "rank 8"]),
    "offsets_backwards": (
        safetensors(entry(data_offsets=[4, 0]), bytes(4)),
        ["'w'", "0 - 4 bytes", "limit 4 bytes"],
    ),
    "offset_is_text": (safetensors(entry(data_offsets=["0", 4]), bytes(4)), ["'w'", "data_offsets"]),
    "three_offsets": (safetensors(entry(data_offsets=[0, 2, 4]), bytes(4)), ["'w'", "data_offsets"]),
    "negative_offset": (safetensors(entry(data_offsets=[-4, 0]), bytes(4)), ["'w'", "data_offsets"]),
    "offsets_beyond_the_file": (
        safetensors(entry(shape=[1 << 50], data_offsets=[0, 1 << 50]), bytes(4)),
        ["ends at", f"needs {(1 << 50)}"[:12], "incomplete"],
    ),
    "offsets_that_do_not_fit_the_shape": (
        safetensors(entry(shape=[3]), bytes(4)),
        ["'w'", "got 4 - 0", "limit 3"],
    ),
    "tensors_that_overlap": (
        safetensors({"a": tensor_entry("U8", [3], 0, 3), "b": tensor_entry("U8", [2], 2, 4)}, bytes(4)),
        ["'b'", "overlap", "offset"],
    ),
    "two_tensors_in_one_place": (
        safetensors({"a": tensor_entry("U8", [4], 0, 4), "b": tensor_entry("U8", [4], 0, 4)}, bytes(4)),
        ["overlap"],
    ),
    "hole_between_tensors": (
        safetensors({"a": tensor_entry("U8", [1], 0, 1), "b": tensor_entry("U8", [2], 2, 4)}, bytes(4)),
        ["'b'", "hole"],
    ),
    "bytes_after_the_last_tensor": (safetensors(ONE, bytes(5)), ["goes on after its last tensor"]),
    "data_cut_short": (safetensors(ONE, bytes(3)), ["file ends at", "its header needs", "incomplete"]),
    "unknown_dtype": (safetensors(entry(dtype="Q4_K"), bytes(4)), ["'w'", "unknown dtype", "'Q4_K'", "BF16"]),
    "dtype_is_a_list": (safetensors(entry(dtype=["U8"]), bytes(4)), ["'w'", "unknown dtype"]),
    "entry_without_dtype": (
        safetensors({"w": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        ["'w'", "other keys"],
    ),
    "entry_with_a_strange_key": (
        safetensors(entry(file="/etc/passwd"), bytes(4)),
        ["'w'", "other keys", "file"],
    ),
    "entry_is_a_number": (safetensors({"w": 5}), ["'w'", "other keys"]),
    "metadata_is_not_text": (safetensors({"__metadata__": {"a": {"b": 1}}}), ["__metadata__", "text"]),
    "name_of_a_megabyte": (
        safetensors({"w" * 1_000_000: tensor_entry("U8", [4], 0, 4)}, bytes(4)),
        ["tensor name", "limit 512"],
    ),
    "name_with_terminal_codes": (
        safetensors({"\x1b[2Jw": tensor_entry("U8", [4], 0, 4)}, bytes(4)),
        ["tensor name", "\\x1b[2Jw"],
    ),
    "name_with_half_a_character": (
        safetensors(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        ["surrogate"],
    ),
    "empty_name": (safetensors({"": tensor_entry("U8", [4], 0, 4)}, bytes(4)), ["tensor name is empty"]),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed_safetensors(case, put, refuses):
    data, parts = CASES[case]
    path = put("model.safetensors", data)
    refuses(lambda: SafetensorsFile.open(path), *parts, header_bytes=len(data))


def test_a_terabyte_that_is_not_there(put, refuses):
    """A sparse file of 1 TiB whose header claims 90 MB of JSON: the header is read, nothing more."""
    path = put("model.safetensors", struct.pack("<Q", 90_000_000) + b"{")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    refuses(lambda: SafetensorsFile.open(path), "not valid JSON", header_bytes=90_000_000)
