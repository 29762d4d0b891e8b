"""GGUF files that are no language models, and files that were joined."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_builders import U16, Gguf, gguf_pair, small_gguf

from krasis.formats.checkpoints.gguf import GgufCheckpoint, GgufFile
from krasis.formats.checkpoints.gguf_kind import check_is_model
from krasis.formats.errors import FormatError, UnsupportedModelError

MODEL = {"general.architecture": "qwen3moe"}


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.type": "adapter", **MODEL}, ["blk.0.attn_q.weight.lora_a"], "adapter"),
        (MODEL, ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"], "adapter"),
        ({"general.architecture": "clip"}, ["v.blk.0.attn_q.weight"], "vision or audio part"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, ["mm.0.weight"], "vision or audio part"),
        (MODEL, ["mm.0.weight", "v.patch_embd.weight"], "vision or audio part"),
        ({"general.type": "imatrix"}, ["blk.0.attn_q.weight.in_sum2"], "importance matrix"),
        ({}, ["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"], "importance matrix"),
        ({"general.architecture": "controlvector"}, ["direction.1"], "control vector"),
    ],
)
def test_what_is_no_model(metadata: dict[str, str], tensors: list[str], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"x.gguf: this GGUF is .*{words}"):
        check_is_model(metadata, tensors, "x.gguf")


def test_a_vocabulary_without_weights() -> None:
    metadata = {**MODEL, "general.name": "Qwen3", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(FormatError, match=r"a vocabulary only.*'Qwen3', 0 tensors"):
        check_is_model(metadata, [], "x.gguf")
    with pytest.raises(FormatError, match=r"no tensors"):
        check_is_model(MODEL, [], "x.gguf")


@pytest.mark.parametrize("kind", ["model", "", 7, None, ["adapter"]])
def test_models_pass_whatever_their_type_says(kind: object) -> None:
    check_is_model({**MODEL, "general.type": kind}, ["token_embd.weight", "mm.x"], "x.gguf")


# ---- joined by cat -----------------------------------------------------------------------------------------


def part(number: int, count: int) -> Gguf:
    small = small_gguf()
    small.pairs += [gguf_pair("split.no", U16, number), gguf_pair("split.count", U16, count)]
    return small


@pytest.mark.parametrize("padding", [0, 5, 31, 4000])
def test_parts_of_gguf_split_that_were_joined(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(part(0, 2).build() + bytes(padding) + part(1, 2).build())
    with pytest.raises(
        FormatError, match=r"several GGUF files were joined.*second header at byte.*gguf-split --merge"
    ):
        GgufCheckpoint.open(path)


def test_whole_files_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_gguf().build() * 2)
    with pytest.raises(FormatError, match=r"joined.*give one of the files"):
        GgufFile.open(path)


def test_bytes_behind_a_file_that_are_no_second_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_gguf().build() + b"GGUF is a format" + bytes(100))
    assert len(GgufFile.open(path).tensors) == 2


def test_all_missing_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00004.gguf").write_bytes(part(1, 4).build())
    with pytest.raises(
        FormatError, match=r"parts 'm-00001-of-00004.gguf', 'm-00003.*are missing \(got 1 of 4 parts"
    ):
        GgufCheckpoint.open(tmp_path / "m-00002-of-00004.gguf")
