"""Files given for others: every kind is told by its first bytes, and a sound file never is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from krasis.formats.checkpoints.gguf import GgufFile
from krasis.formats.checkpoints.safetensors import SafetensorsFile
from krasis.formats.errors import FormatError
from krasis.formats.files.file_kinds import kind_of_bytes, refuse_text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4932342232\n"


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 2000)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return buffer.getvalue()


def array_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(9))
    return buffer.getvalue()


KINDS = {
    "lfs": (LFS, ["git-lfs pointer", "of 4.93 GB", "git lfs pull"]),
    "old-lfs": (LFS.replace(b"git-lfs.github.com", b"hawser.github.com"), ["git-lfs pointer"]),
    "html": (
        b"\n<!DOCTYPE html>\n<html><title>Log in\x1b[2J</title>",
        ["HTML page", "Log in\\x1b", "download failed"],
    ),
    "html-bom": (b"\xef\xbb\xbf<HTML lang='en'>", ["HTML page"]),
    "xml": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', ["XML", "download failed"]),
    "json": (b'{"a": [1, 2, 3], "weight_map": {}}', ["JSON text"]),
    "json-error": (b'{"error":"Repository not found"}', ["server's answer", "Repository not found"]),
    "answer": (b"Entry not found", ["server's answer", "Entry not found"]),
    "gated": (b"Access to model Qwen/Qwen3 is restricted. You must log in.", ["server's answer"]),
    "zip": (zipped("a.txt"), ["zip archive", "unpack"]),
    "torch": (zipped("archive/data.pkl"), ["PyTorch pickle", "safe_serialization"]),
    "pickle": (pickle.dumps({"w": 1}, 2), ["Python pickle", "any code"]),
    "tar": (tarred(), ["tar archive"]),
    "gzip": (gzip.compress(b"x"), ["gzip archive"]),
    "bzip2": (bz2.compress(b"x"), ["bzip2 archive"]),
    "xz": (lzma.compress(b"x"), ["xz archive"]),
    "zstd": (zstandard.compress(b"x"), ["Zstandard archive"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), ["HDF5"]),
    "npy": (array_file(), ["NumPy"]),
    "ggjt": (b"tjgg\x03\0\0\0" + bytes(90), ["GGML file of the time before GGUF"]),
    "zeros": (bytes(4096), ["nothing but zeros", "not finished"]),
    "text": (b"# Qwen3\nThis is the model card.\n", ["a text that begins '# Qwen3'"]),
    "empty": (b"", ["empty", "download failed"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_weights_that_are_something_else(tmp_path: Path, kind: str, name: str) -> None:
    data, parts = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        (GgufFile if name.endswith("gguf") else SafetensorsFile).open(path)
    sentence = str(caught.value)
    for part in (str(path), *parts):
        assert part in sentence
    assert sentence.isprintable()


def test_one_format_given_for_the_other(tmp_path: Path) -> None:
    sound = b"\x10\0\0\0\0\0\0\0" + b"{}" + b" " * 14
    (tmp_path / "a.gguf").write_bytes(sound + bytes(64))
    with pytest.raises(FormatError, match="not a GGUF file"):
        GgufFile.open(tmp_path / "a.gguf")
    (tmp_path / "a.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with pytest.raises(FormatError, match="not a safetensors file: this is a GGUF file"):
        SafetensorsFile.open(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_unfinished_downloads_by_their_names(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.safetensors{suffix}"
    path.write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(FormatError, match="unfinished download"):
        SafetensorsFile.open(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\0" * 100,
        bytes(range(256)),
        b"\xff\xfe" * 300,
        b"\x80\x02"[:1],
        b"PK",
        "ä".encode()[:1] * 50,
    ],
)
def test_what_says_nothing_is_not_guessed(data: bytes) -> None:
    assert kind_of_bytes(data) is None


@pytest.mark.parametrize("kind", ["lfs", "html", "xml", "zip", "gzip", "answer", "zeros", "empty"])
def test_text_files_that_are_something_else(tmp_path: Path, kind: str) -> None:
    data, parts = KINDS[kind]
    with pytest.raises(FormatError, match=parts[0]):
        refuse_text(data, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", json.dumps({"error": "a model may say so", "pad": "x" * 2000}).encode()),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("config.json", b'\xef\xbb\xbf {"not found": 1, "model_type": "qwen3_moe"}'),
        ("chat_template.jinja", b"Not found: {{ messages }}"),
        ("chat_template.jinja", b""),
        ("chat_template.jinja", b"{% for m in messages %}{{ m }}{% endfor %}"),
    ],
)
def test_honest_text_files_pass(tmp_path: Path, name: str, data: bytes) -> None:
    refuse_text(data, tmp_path / name)
