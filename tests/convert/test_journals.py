"""A damaged journal is told in one sentence with the way out; it is never followed, and never a traceback."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path

import pytest

from krasis.convert import journal as journal_module
from krasis.convert.journal import JOURNAL_NAME, decode_lines, encode_line
from krasis.convert.partial import partial_path
from krasis.formats.errors import MismatchError
from krasis.formats.files.file_ops import FileOps


class Interrupted(FileOps):
    """Stops at the end, before the bundle gets its name."""

    def rename_noreplace(self, source, target):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(model_class, shape_class, tmp_path_factory) -> Path:
    shape = shape_class(layers=1, experts=2, hidden=64, heads=2, kv_heads=1, intermediate=64, vocab=40)
    return model_class(shape).write_hf(tmp_path_factory.mktemp("small") / "hf", tokenizer=False)


@pytest.fixture(scope="module")
def expected(run, source, tmp_path_factory):
    return run([source], tmp_path_factory.mktemp("expected") / "x.krasis", gpu_group=64).files()


@pytest.fixture
def convert(run, source, fast_dir):
    def call(**options):
        return run([source], fast_dir / "x.krasis", gpu_group=64, **options)

    return call


@pytest.fixture
def journal(convert, fast_dir) -> Path:
    """Of a conversion that stopped just before its end."""
    with pytest.raises(KeyboardInterrupt):
        convert(io=Interrupted())
    return partial_path(fast_dir / "x.krasis") / JOURNAL_NAME


def refused(convert) -> str:
    with pytest.raises(MismatchError) as caught:
        convert()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "--restart" in sentence
    return sentence


def changed(journal: Path, line: int, change) -> None:
    """Rewrites a line, its checksum made to fit."""
    records, _ = decode_lines(journal.read_bytes())
    change(records[line])
    journal.write_bytes(b"".join(map(encode_line, records)))


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\n",
        b"\n",
        b"\x00" * 100_000 + b"\n",
        b"0123456789abcdef {}\n",
        encode_line({}),
        encode_line({"krasis_journal": 2, "fingerprint": {}}),
        encode_line({"krasis_journal": "1", "fingerprint": {}}),
        encode_line({"krasis_journal": 1}),
        encode_line({"krasis_journal": 1, "fingerprint": []}),
        encode_line({"krasis_journal": 1, "fingerprint": None}),
        encode_line({"krasis_journal": 1, "fingerprint": {}}),
        encode_line({"krasis_journal": 1, "fingerprint": {"recipe": [1], "sources": 3}}),
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_first_line_that_says_nothing(convert, journal, expected, data):
    journal.write_bytes(data)
    refused(convert)
    assert journal.read_bytes() == data  # nothing that was done is thrown away unasked
    assert convert(restart=True).files() == expected


@pytest.mark.parametrize("key", ["tool_version", "recipe", "sources", "assets", "plan"])
@pytest.mark.parametrize(
    "value", [None, 7, "x", [], [[]], {}, {"hf": 1}, {"hf": [1]}, {"hf": [{"name": []}]}, {"a": {}}]
)
def test_a_fingerprint_of_other_types(convert, journal, key, value):
    changed(journal, 0, lambda record: record["fingerprint"].update({key: value}))
    refused(convert)


def test_a_fingerprint_with_more_in_it(convert, journal):
    changed(journal, 0, lambda record: record["fingerprint"].update(new_field=1))
    refused(convert)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        for key in path:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize("line", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        _set("unit", "layers.9.cpu"),
        _set("unit", ["x"]),
        _set("unit", None),
        _set("blobs", []),
        _set("blobs", {}),
        _set("blobs", "text"),
        _set("blobs", {"x": "00" * 16}),
        _set("tensors", None),
        _set("tensors", {"a": 1}),
        _set("tensors", {"a": "short"}),
        _set("quality", {}),
        _set("quality", 3),
        _set("quality", "layer", 77),
        _set("quality", "layer", "0"),
        _set("quality", "kinds", []),
        _set("quality", "kinds", {"x": [1, 2, 3]}),
        _set("quality", "kinds", {"x": [float("nan"), 1.0, 1.0, 1]}),
        _set("quality", "kinds", {"x": ["1", "2", "3", "4"]}),
        _set("quality", "experts", {"experts.cpu.w2": []}),
        lambda record: record.pop("quality"),
        lambda record: record.update(more=1),
    ],
)
def test_a_step_of_other_types(convert, journal, line, change):
    changed(journal, line, change)
    refused(convert)


def test_a_step_twice(convert, journal):
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], lines[1], *lines[2:]]))
    refused(convert)


def test_a_huge_journal(convert, journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_JOURNAL_BYTES", 1000)
    assert "too large" in refused(convert)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_no_regular_file(convert, journal, kind):
    journal.unlink()
    if kind == "fifo":
        os.mkfifo(journal)
    elif kind == "folder":
        journal.mkdir()
    else:
        journal.symlink_to("/dev/zero")
    refused(convert)


@pytest.mark.parametrize("num_bytes", [0, 1, 20, 100])
def test_torn_in_the_very_first_line(convert, journal, expected, num_bytes):
    """Killed before anything was finished: nothing is lost by beginning anew."""
    journal.write_bytes(journal.read_bytes()[:num_bytes])
    assert convert().files() == expected


def test_whatever_is_changed_the_bundle_is_right_or_refused(convert, journal, expected, fast_dir):
    """A bit anywhere, a cut anywhere, garbage behind."""
    data, rng = journal.read_bytes(), random.Random(5)
    num_refused = 0
    for case in range(30):
        altered = bytearray(data)
        if case % 3 == 0:
            altered[rng.randrange(len(altered))] ^= 1 << rng.randrange(8)
        elif case % 3 == 1:
            del altered[rng.randrange(len(altered)) :]
        else:
            altered += bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        journal.write_bytes(altered)
        with pytest.raises((KeyboardInterrupt, MismatchError)) as caught:
            convert(io=Interrupted())
        if caught.type is MismatchError:
            assert "--restart" in str(caught.value)
            num_refused += 1
    assert num_refused < 15
    journal.write_bytes(data)
    assert convert().files() == expected


def test_the_journal_of_a_sound_run_passes(convert, journal, expected):
    before = copy.deepcopy(decode_lines(journal.read_bytes())[0])
    assert json.loads(json.dumps(before)) == before
    again = convert()
    assert again.files() == expected
    assert again.summary.source_bytes == 0
