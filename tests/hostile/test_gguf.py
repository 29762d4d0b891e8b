"""Malformed GGUF files, one a case."""

import struct

import pytest
from format_builders import (
    ARRAY,
    BOOL,
    STRING,
    U8,
    U32,
    U64,
    Gguf,
    gguf_pair,
    gguf_record,
    gguf_string,
    qwen3moe_pairs,
    small_gguf,
)

from krasis.formats.checkpoints.gguf import GgufCheckpoint, GgufFile

HUGE = (1 << 64) - 1


def with_pair(pair):
    return Gguf(pairs=[pair], data=bytes(64)).build()


def with_record(*records, data=bytes(64), pairs=()):
    return Gguf(pairs=list(pairs), records=list(records), data=data).build()


def array(item, count, raw=b""):
    return gguf_string("k") + struct.pack("<IIQ", ARRAY, item, count) + raw


def nested(depth):
    return (
        gguf_string("k")
        + struct.pack("<I", ARRAY)
        + struct.pack("<IQ", ARRAY, 1) * depth
        + struct.pack("<IQ", U8, 0)
    )


CASES = {
    "wrong_magic": (Gguf(magic=b"GGML").build(), ["not a GGUF file", "GGML"]),
    "only_a_magic": (b"GGUF", ["too short"]),
    "version_one": (Gguf(version=struct.pack("<I", 1)).build(), ["version is not supported", "got 1"]),
    "version_of_the_future": (
        Gguf(version=struct.pack("<I", 9)).build(),
        ["version is not supported", "got 9"],
    ),
    "version_zero": (Gguf(version=bytes(4)).build(), ["version is not supported", "got 0"]),
    "big_endian": (Gguf(version=struct.pack(">I", 3)).build(), ["big-endian", "convert"]),
    "more_tensors_than_bytes": (
        Gguf(num_tensors=HUGE).build(),
        ["more tensors than the file can hold", str(HUGE)],
    ),
    "a_million_tensors_in_a_small_file": (
        Gguf(num_tensors=1_000_000, data=bytes(1000)).build(),
        ["more tensors than"],
    ),
    "more_pairs_than_bytes": (Gguf(num_pairs=HUGE).build(), ["more metadata pairs than", str(HUGE)]),
    "one_pair_too_many": (
        Gguf(pairs=[gguf_pair("k", U8, 1)], num_pairs=2, data=bytes(64)).build(),
        ["metadata key is empty"],
    ),
    "key_longer_than_the_file": (
        Gguf(pairs=[struct.pack("<Q", HUGE)], num_pairs=1, data=bytes(64)).build(),
        ["key exceeds the file"],
    ),
    "key_of_a_megabyte": (with_pair(gguf_pair("k" * 1_000_000, U8, 1)), ["key is too long", "65535"]),
    "key_twice": (Gguf(pairs=[gguf_pair("k", U8, 1)] * 2).build(), ["'k'", "occurs twice"]),
    "key_is_not_utf8": (with_pair(gguf_pair(b"\xff\xfe", U8, 1)), ["key is not UTF-8"]),
    "unknown_type_of_value": (
        with_pair(gguf_string("k") + struct.pack("<I", 13)),
        ["'k'", "unknown type", "got 13"],
    ),
    "string_longer_than_the_file": (
        with_pair(gguf_string("k") + struct.pack("<IQ", STRING, 1 << 40)),
        ["'k'", "string exceeds the file"],
    ),
    "string_length_with_all_bits_set": (
        with_pair(gguf_string("k") + struct.pack("<IQ", STRING, HUGE)),
        ["'k'", "exceeds"],
    ),
    "string_is_not_utf8": (with_pair(gguf_pair("k", STRING, b"\xc3\x28")), ["'k'", "not UTF-8"]),
    "boolean_of_two": (with_pair(gguf_string("k") + struct.pack("<IB", BOOL, 2)), ["'k'", "neither 0 nor 1"]),
    "array_longer_than_the_file": (with_pair(array(U32, 1 << 61)), ["'k'", "array exceeds the file"]),
    "array_whose_bytes_overflow": (with_pair(array(U64, 1 << 61)), ["'k'", "array exceeds the file"]),
    "array_of_a_billion_strings": (with_pair(array(STRING, 10**9)), ["'k'", "array exceeds the file"]),
    "array_of_more_items_than_any_model": (
        with_pair(array(U8, 5_000_000, bytes(5_000_000))),
        ["'k'", "too long"],
    ),
    "array_of_strings_that_runs_out": (
        with_pair(array(STRING, 8, struct.pack("<Q", 60))),
        ["'k'", "of 8 at"],
    ),
    "array_of_unknown_type": (with_pair(array(99, 1)), ["'k'", "unknown type", "99"]),
    "array_of_booleans_of_two": (with_pair(array(BOOL, 2, b"\1\2")), ["'k'", "neither 0 nor 1"]),
    "arrays_nested_a_thousand_deep": (with_pair(nested(1000)), ["'k'", "nested too deeply", "limit 4"]),
    "alignment_of_zero": (
        with_pair(gguf_pair("general.alignment", U32, 0)),
        ["general.alignment", "power of two"],
    ),
    "alignment_of_three": (
        with_pair(gguf_pair("general.alignment", U32, 3)),
        ["general.alignment", "power of two"],
    ),
    "alignment_of_a_gigabyte": (
        with_pair(gguf_pair("general.alignment", U32, 1 << 30)),
        ["general.alignment"],
    ),
    "alignment_is_text": (with_pair(gguf_pair("general.alignment", STRING, "32")), ["general.alignment"]),
    "tensor_without_dimensions": (with_record(gguf_record("t", [], 0, 0)), ["'t'", "rank", "got 0"]),
    "tensor_of_five_dimensions": (with_record(gguf_record("t", [1] * 5, 0, 0)), ["'t'", "rank", "got 5"]),
    "tensor_of_four_billion_dimensions": (
        with_record(gguf_string("t") + struct.pack("<I", 0xFFFFFFFF)),
        ["'t'", "rank"],
    ),
    "tensor_with_a_zero_dimension": (with_record(gguf_record("t", [0, 4], 0, 0)), ["'t'", "impossible size"]),
    "tensor_whose_size_overflows": (
        with_record(gguf_record("t", [1 << 32, 1 << 32], 0, 0)),
        ["'t'", "overflows"],
    ),
    "tensor_with_a_dimension_of_all_bits": (
        with_record(gguf_record("t", [HUGE], 0, 0)),
        ["'t'", "impossible size"],
    ),
    "tensor_of_unknown_type": (
        with_record(gguf_record("t", [4], 77, 0)),
        ["'t'", "tensor type 77 is not known", "newer than the installed gguf package"],
    ),
    "tensor_of_a_removed_type": (
        with_record(gguf_record("t", [32], 4, 0)),
        ["'t'", "tensor type Q4_2 was removed from llama.cpp", "got type number 4"],
    ),
    "tensor_with_half_a_block": (
        with_record(gguf_record("t", [33], 8, 0)),
        ["'t'", "whole number of Q8_0 blocks", "33"],
    ),
    "tensor_not_aligned": (with_record(gguf_record("t", [4], 0, 4)), ["'t'", "not aligned", "offset 4"]),
    "tensor_offset_overflows": (with_record(gguf_record("t", [4], 0, HUGE - 31)), ["'t'", "overflows"]),
    "tensor_beyond_the_file": (
        with_record(gguf_record("t", [4], 0, 1 << 40)),
        ["'t'", "its header needs", "incomplete"],
    ),
    "tensor_cut_short": (
        with_record(gguf_record("t", [17], 0, 0)),
        ["'t'", "its header needs", "incomplete"],
    ),
    "tensors_that_overlap": (
        with_record(gguf_record("t", [16], 0, 0), gguf_record("u", [8], 0, 32)),
        ["'u'", "overlap", "'t'"],
    ),
    "tensor_twice": (
        with_record(gguf_record("t", [4], 0, 0), gguf_record("t", [4], 0, 32)),
        ["'t'", "occurs twice"],
    ),
    "tensor_without_a_name": (with_record(gguf_record("", [4], 0, 0)), ["tensor name is empty"]),
    "tensor_name_with_control_characters": (
        with_record(gguf_record("a\r\nb", [4], 0, 0)),
        ["control characters", "\\r\\n"],
    ),
    "tensor_name_of_a_kilobyte": (with_record(gguf_record("t" * 1024, [4], 0, 0)), ["too long", "512"]),
    "record_cut_short": (
        Gguf(records=[gguf_record("t" * 20, [1] * 4, 0, 0)]).build()[:60],
        ["exceeds the file", "left"],
    ),
    "split_without_its_siblings": (
        Gguf(pairs=[gguf_pair("split.count", U32, 3), gguf_pair("split.no", U32, 0)]).build(),
        ["not the part", "original names"],
    ),
    "split_count_is_text": (Gguf(pairs=[gguf_pair("split.count", STRING, "2")]).build(), ["not the part"]),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed_gguf(case, put, refuses):
    data, parts = CASES[case]
    path = put("model.gguf", data)
    refuses(lambda: GgufCheckpoint.open(path), *parts, header_bytes=len(data))


def test_a_name_that_claims_a_hundred_thousand_parts(put, refuses):
    path = put("m-00001-of-99999.gguf", small_gguf().build())
    refuses(
        lambda: GgufCheckpoint.open(path),
        "'m-00002-of-99999.gguf'",
        "99994 more are missing",
        header_bytes=30 << 20,
    )


def test_a_name_of_part_zero(put, refuses):
    path = put("m-00000-of-00002.gguf", small_gguf().build())
    refuses(lambda: GgufCheckpoint.open(path), "impossible part", header_bytes=0)


def test_a_header_beyond_the_bound(put, refuses):
    """Sparse: 200 MB of header that are not there."""
    head = Gguf(pairs=[gguf_string("k") + struct.pack("<IQ", STRING, 150_000_000)], num_pairs=1).build()
    path = put("model.gguf", head)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    refuses(lambda: GgufFile.open(path), "'k'", "bound on a header", header_bytes=1000)


def test_a_sparse_terabyte_of_zeros(put, refuses):
    path = put("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 100_000))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    refuses(lambda: GgufFile.open(path), "empty", header_bytes=1000)


def test_qwen_metadata_without_tensors(put, refuses):
    from krasis.formats.architecture import from_gguf_metadata

    opened = GgufFile.open(put("model.gguf", Gguf(pairs=qwen3moe_pairs()).build()))
    refuses(
        lambda: from_gguf_metadata(opened.metadata, opened.tensors, str(opened.path)),
        "token_embd.weight",
        "missing",
        header_bytes=1000,
    )
