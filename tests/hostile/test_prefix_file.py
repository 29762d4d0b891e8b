"""Malformed saved prefixes, one a case: each is refused by a sentence before the cache is touched."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_builders import safetensors, safetensors_of, tensor_entry

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import (
    ChecksumError,
    FormatError,
    KrasisError,
    MismatchError,
    UsageError,
    VersionError,
)
from krasis.runtime.state.kv_file import PrefixFile, bundle_identity

LAYERS, HEADS, NUM, DIM = 2, 2, 3, 32  # of format_builders' bundle, and the tokens of these files


class UntouchedCache:
    """A cache that must not be written to."""

    capacity, kv_dtype = 100, "f16"

    @property
    def state(self) -> Any:
        return self

    def import_(self, *_: Any) -> None:
        raise AssertionError("the cache was touched")


@pytest.fixture(scope="module")
def opened(sound_bundle: Path) -> Iterator[Bundle]:
    with Bundle.open(sound_bundle) as bundle:
        yield bundle


def arrays(**changes: Any) -> dict[str, tuple[str, np.ndarray]]:
    kv = np.zeros((LAYERS, HEADS, NUM, DIM), "<f2")
    given = {
        "keys": ("F16", kv),
        "values": ("F16", kv),
        "tokens": ("I32", np.arange(NUM, dtype="<i4")),
        **changes,
    }
    return {name: value for name, value in given.items() if value is not ...}


def metadata(opened: Bundle, tensors: dict[str, tuple[str, np.ndarray]], **changes: Any) -> dict[str, str]:
    import xxhash

    digests = {
        f"xxh3_128.{name}": xxhash.xxh3_128_hexdigest(array.tobytes()) for name, (_, array) in tensors.items()
    }
    known = {
        "format": "krasis-prefix",
        "version": "1",
        "bundle": bundle_identity(opened),
        **digests,
        **changes,
    }
    return {name: value for name, value in known.items() if value is not ...}


KV2 = np.zeros((LAYERS, HEADS, 2, DIM), "<f2")
THIN = np.zeros((LAYERS, 1, NUM, DIM), "<f2")
# Changes to tensors, changes to metadata, the error, parts of the sentence.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], type[KrasisError], list[str]]] = {
    "of_another_program": ({}, {"format": "pt"}, FormatError, ["no saved prefix"]),
    "no_format": ({}, {"format": ...}, FormatError, ["no saved prefix"]),
    "newer_version": ({}, {"version": "2"}, VersionError, ["another format version", "2"]),
    "no_version": ({}, {"version": ...}, VersionError, ["another format version"]),
    "of_another_bundle": ({}, {"bundle": "0" * 32}, MismatchError, ["another bundle"]),
    "of_no_bundle": ({}, {"bundle": ...}, MismatchError, ["another bundle"]),
    "bundle_named_by_control_characters": (
        {},
        {"bundle": "\x1b[2J\n" * 90},
        MismatchError,
        ["another bundle"],
    ),
    "no_values": ({"values": ...}, {}, FormatError, ["other tensors"]),
    "no_keys": ({"keys": ...}, {}, FormatError, ["other tensors"]),
    "neither_keys_nor_latents": ({"keys": ..., "values": ...}, {}, FormatError, ["other tensors"]),
    "latents_of_another_type_than_keys": (
        {"latents": ("F32", np.zeros((LAYERS, 1, NUM, DIM), "<f4"))},
        {},
        FormatError,
        ["latents", "F16, BF16, F32 or U8"],
    ),
    "latents_of_fewer_tokens": ({"latents": ("F16", KV2)}, {}, FormatError, ["latents", "[layers, heads, 3"]),
    "latents_in_a_model_of_keys": (
        {"latents": ("F16", np.zeros((LAYERS, 1, NUM, DIM), "<f2"))},
        {},
        FormatError,
        ["other tensors", "latents", "keys, values of this model"],
    ),
    "windows_for_a_cache_of_whole_contexts": (
        {"window_keys": ("F16", KV2), "window_values": ("F16", KV2)},
        {},
        MismatchError,
        ["ends of windows", "--device cpu"],
    ),
    "window_values_of_another_shape": (
        {"window_keys": ("F16", KV2), "window_values": ("F16", THIN)},
        {},
        FormatError,
        ["window_values", "as the keys"],
    ),
    "window_keys_alone": ({"window_keys": ("F16", KV2)}, {}, FormatError, ["other tensors"]),
    "no_tokens": ({"tokens": ...}, {}, FormatError, ["other tensors"]),
    "a_tensor_more": ({"extra": ("U8", np.zeros(4, "u1"))}, {}, FormatError, ["other tensors", "extra"]),
    "tokens_of_64_bits": ({"tokens": ("I64", np.zeros(NUM, "<i8"))}, {}, FormatError, ["tokens", "I32 [n]"]),
    "tokens_in_two_dimensions": (
        {"tokens": ("I32", np.zeros((1, NUM), "<i4"))},
        {},
        FormatError,
        ["tokens", "I32 [n]"],
    ),
    "no_token_at_all": ({"tokens": ("I32", np.zeros(0, "<i4"))}, {}, FormatError, ["tokens", "I32 [n]"]),
    "fewer_keys_than_tokens": ({"keys": ("F16", KV2)}, {}, FormatError, ["keys", "[layers, heads, 3"]),
    "fewer_values_than_keys": ({"values": ("F16", KV2)}, {}, FormatError, ["values", "as the keys"]),
    "values_of_another_type": (
        {"values": ("BF16", np.zeros((LAYERS, HEADS, NUM, DIM), "<u2"))},
        {},
        FormatError,
        ["values", "as the keys"],
    ),
    "keys_of_integers": (
        {"keys": ("I32", np.zeros((LAYERS, HEADS, NUM, DIM), "<i4"))},
        {},
        FormatError,
        ["keys", "F16, BF16, F32 or U8"],
    ),
    "keys_of_bytes_beside_values_of_floats": (
        {"keys": ("U8", np.zeros((LAYERS, HEADS, NUM, DIM), "u1"))},
        {},
        FormatError,
        ["values", "U8", "as the keys"],
    ),
    "keys_in_one_dimension": (
        {"keys": ("F16", KV2.reshape(-1))},
        {},
        FormatError,
        ["keys", "F16, BF16, F32 or U8"],
    ),
    "heads_missing": (
        {"keys": ("F16", THIN), "values": ("F16", THIN)},
        {},
        FormatError,
        ["keys", "[2, 1, 3, 32]", "[2, 2, 3, 32]"],
    ),
    "no_layers": (
        {name: ("F16", np.zeros((0, HEADS, NUM, DIM), "<f2")) for name in ("keys", "values")},
        {},
        FormatError,
        ["keys", "[0, 2, 3, 32]"],
    ),
    "another_precision": (
        {name: ("F32", np.zeros((LAYERS, HEADS, NUM, DIM), "<f4")) for name in ("keys", "values")},
        {},
        MismatchError,
        ["another precision", "got f32; limit f16"],
    ),
    "a_token_beyond_the_vocabulary": (
        {"tokens": ("I32", np.array([1, 100, 2], "<i4"))},
        {},
        FormatError,
        ["outside the vocabulary", "got 100; limit 100"],
    ),
    "a_negative_token": (
        {"tokens": ("I32", np.array([1, -7, 99], "<i4"))},
        {},
        FormatError,
        ["outside the vocabulary", "got -7"],
    ),
    "a_digest_missing": ({}, {"xxh3_128.values": ...}, ChecksumError, ["altered", "values"]),
    "a_digest_of_other_keys": ({}, {"xxh3_128.keys": "f" * 32}, ChecksumError, ["altered", "keys"]),
    "tokens_altered": ({}, {"xxh3_128.tokens": "0" * 32}, ChecksumError, ["altered", "tokens"]),
    "conversation_of_floats": (
        {"conversation": ("F32", np.zeros(2, "<f4"))},
        {},
        FormatError,
        ["conversation", "U8"],
    ),
}


def take(path: Path, bundle: Bundle) -> None:
    """What Engine.load_prefix does before it touches the cache."""
    cache: Any = UntouchedCache()
    with PrefixFile(path) as file:
        file.check(bundle, cache)
        file.verify()
        file.tokens(bundle.architecture)


def test_the_sound_file_is_taken(put: Callable[[str, bytes], Path], opened: Bundle) -> None:
    tensors = arrays()
    take(put("a.kv", safetensors_of(tensors, metadata(opened, tensors))), opened)


@pytest.mark.parametrize("case", CASES)
def test_refused(
    put: Callable[[str, bytes], Path], refuses: Callable[..., KrasisError], opened: Bundle, case: str
) -> None:
    tensor_changes, metadata_changes, error, parts = CASES[case]
    tensors = arrays(**tensor_changes)
    data = safetensors_of(tensors, metadata(opened, tensors, **metadata_changes))
    path = put("a.kv", data)
    refuses(lambda: take(path, opened), *parts, header_bytes=len(data), error=error)


def test_more_tokens_than_the_context(
    put: Callable[[str, bytes], Path], refuses: Callable[..., KrasisError], opened: Bundle
) -> None:
    kv = ("F16", np.zeros((LAYERS, HEADS, 101, DIM), "<f2"))
    tensors = arrays(keys=kv, values=kv, tokens=("I32", np.zeros(101, "<i4")))
    path = put("a.kv", safetensors_of(tensors, metadata(opened, tensors)))
    refuses(
        lambda: take(path, opened), "longer than the context", "--ctx", header_bytes=4096, error=UsageError
    )


@pytest.mark.parametrize("cut", [1, 100, 4, 10_000])
def test_cut_short(
    put: Callable[[str, bytes], Path], refuses: Callable[..., KrasisError], opened: Bundle, cut: int
) -> None:
    tensors = arrays()
    data = safetensors_of(tensors, metadata(opened, tensors))
    path = put("a.kv", data[: max(3, len(data) - cut)])
    refuses(lambda: take(path, opened), "incomplete", header_bytes=len(data))


def test_one_flipped_bit_anywhere_is_found(put: Callable[[str, bytes], Path], opened: Bundle) -> None:
    random = np.random.default_rng(5)
    kv = ("F16", random.standard_normal((LAYERS, HEADS, NUM, DIM)).astype("<f2"))
    tensors = arrays(keys=kv, values=kv, conversation=("U8", np.frombuffer(b'{"messages": []}', "u1")))
    data = bytearray(safetensors_of(tensors, metadata(opened, tensors, computed_by=...)))
    for place in [*range(0, 900, 7), *random.integers(0, len(data), 300)]:
        data[place] ^= 1 << int(place) % 8
        with pytest.raises(KrasisError):
            take(put("a.kv", bytes(data)), opened)
        data[place] ^= 1 << int(place) % 8
    take(put("a.kv", bytes(data)), opened)


def test_absurd_sizes(
    put: Callable[[str, bytes], Path], refuses: Callable[..., KrasisError], opened: Bundle
) -> None:
    huge = tensor_entry("F16", [LAYERS, HEADS, 1 << 40, DIM], 0, LAYERS * HEADS * DIM * 2 << 40)
    header = {"__metadata__": metadata(opened, {}), "keys": huge}
    for data in (safetensors(header), struct.pack("<Q", 1 << 62) + b"{}", b""):
        path = put("a.kv", data)
        refuses(lambda path=path: take(path, opened), header_bytes=4096)


def test_no_regular_file(tmp_path: Path, refuses: Callable[..., KrasisError], opened: Bundle) -> None:
    import os

    os.mkfifo(tmp_path / "fifo.kv")
    (tmp_path / "folder.kv").mkdir()
    for name, words in (("fifo.kv", "FIFO"), ("folder.kv", "directory"), ("none.kv", "missing")):
        refuses(lambda name=name: take(tmp_path / name, opened), words, header_bytes=0)
