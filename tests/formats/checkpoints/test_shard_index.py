"""Which of a folder's files are the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from format_builders import safetensors_of

from krasis.formats.checkpoints.safetensors import SafetensorsFile, ShardedCheckpoint
from krasis.formats.checkpoints.shard_index import find_entry
from krasis.formats.errors import FormatError


def tensors(*names: str, value: float = 1.0) -> bytes:
    return safetensors_of({name: ("F32", np.full(8, value, "<f4")) for name in names})


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(tensors("a", "b"))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(tensors("c"))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(tmp_path, {"a": first, "b": first, "c": second})
    return tmp_path


def names_of(folder: Path) -> set[str]:
    return set(ShardedCheckpoint.open(folder).tensors)


@pytest.mark.parametrize("other", ["consolidated", "model.fp16", "aaa"])
def test_the_usual_index_is_taken_among_several(sharded: Path, other: str) -> None:
    (sharded / f"{other}.safetensors").write_bytes(tensors("z"))
    path = index(sharded, {"z": f"{other}.safetensors"}, f"{other}.safetensors.index.json")
    checkpoint = ShardedCheckpoint.open(sharded)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    (note,) = checkpoint.notes
    assert f"{other}.safetensors.index.json, {other}.safetensors left alone" in note
    assert names_of(path) == {"z"}  # named, it is read


def test_several_indexes_without_the_usual_one_are_told(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").rename(sharded / "x.safetensors.index.json")
    index(sharded, {"a": "model-00001-of-00002.safetensors"}, "y.safetensors.index.json")
    with pytest.raises(FormatError, match=r"several indexes.*x\.saf.*y\.saf.*name the one to read"):
        ShardedCheckpoint.open(sharded)
    assert names_of(sharded / "x.safetensors.index.json") == {"a", "b", "c"}


@pytest.mark.parametrize(
    "others",
    [
        ["consolidated.safetensors", "adapter_model.safetensors"],
        ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["model.fp16.safetensors"],
    ],
)
def test_a_single_model_file_is_taken_as_transformers_does(tmp_path: Path, others: list[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(tensors("a"))
    for name in others:
        (tmp_path / name).write_bytes(tensors("a", value=9))
    checkpoint = ShardedCheckpoint.open(tmp_path)
    assert checkpoint.view("a").view("<f4")[0] == 1.0
    assert all(name in checkpoint.notes[0] for name in others)


def test_a_single_file_beside_an_index_of_other_shards(sharded: Path) -> None:
    """transformers looks for model.safetensors first."""
    (sharded / "model.safetensors").write_bytes(tensors("only"))
    assert names_of(sharded) == {"only"}
    index(sharded, {"only": "model.safetensors"})
    assert names_of(sharded) == {"only"}


def test_files_of_macos_are_no_shards(sharded: Path) -> None:
    (sharded / "._model-00001-of-00002.safetensors").write_bytes(b"\0\5\x16\7" + bytes(60))
    (sharded / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    assert names_of(sharded) == {"a", "b", "c"}
    assert ShardedCheckpoint.open(sharded).notes == ()


def test_numbered_shards_without_an_index_are_read_together(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "consolidated.safetensors").write_bytes(tensors("z"))
    checkpoint = ShardedCheckpoint.open(sharded)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert any("no index" in note for note in checkpoint.notes)
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"shard 'model-00001-of-00002.safetensors' is missing.*1 of 2"):
        ShardedCheckpoint.open(sharded)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors("lora"))
    with pytest.raises(FormatError, match=r"adapter \(LoRA\).*merge"):
        find_entry(tmp_path)


def test_every_missing_shard_is_named(sharded: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (sharded / name).unlink()
    with pytest.raises(
        FormatError, match=r"shards 'model-00001.*', 'model-00002.*' are missing \(got 0 of 2 that"
    ):
        ShardedCheckpoint.open(sharded)
    (sharded / "model-00001-of-00002.safetensors").symlink_to("/nowhere/blob")
    with pytest.raises(FormatError, match="link that leads nowhere"):
        ShardedCheckpoint.open(sharded)


def test_an_index_that_is_a_pointer(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\nsize 5\n"
    )
    with pytest.raises(FormatError, match="git-lfs pointer"):
        ShardedCheckpoint.open(sharded)


# ---- index and shards --------------------------------------------------------------------------------------


def test_tensors_that_the_index_does_not_list_are_there(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").write_bytes(tensors("c", "rotary_emb.inv_freq"))
    assert names_of(sharded) == {"a", "b", "c", "rotary_emb.inv_freq"}


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(sharded, {"a": first, "b": second, "c": second})
    checkpoint = ShardedCheckpoint.open(sharded)
    assert checkpoint.file_of("b").path.name == first


def test_the_same_tensor_twice_is_taken_and_another_of_its_name_refused(sharded: Path) -> None:
    second = sharded / "model-00002-of-00002.safetensors"
    second.write_bytes(tensors("a", "c"))
    assert ShardedCheckpoint.open(sharded).file_of("a").path.name == "model-00001-of-00002.safetensors"
    data = bytearray(second.read_bytes())
    data[-40] ^= 1  # the last byte but one of a's values
    second.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"model-00002.*'a': two shards hold.*another in model-00001"):
        ShardedCheckpoint.open(sharded)
    second.write_bytes(
        safetensors_of({"a": ("F32", np.ones((2, 4), "<f4")), "c": ("F32", np.ones(8, "<f4"))})
    )
    with pytest.raises(FormatError, match="'a': two shards hold"):
        ShardedCheckpoint.open(sharded)


def test_shards_joined_by_cat(tmp_path: Path) -> None:
    one, two = tensors("a", "b"), tensors("c")
    (tmp_path / "model.safetensors").write_bytes(one + two)
    with pytest.raises(
        FormatError, match=rf"several safetensors files were joined.*second header at byte {len(one)}"
    ):
        SafetensorsFile.open(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(one + b"tail")
    with pytest.raises(FormatError, match="goes on after its last tensor"):
        SafetensorsFile.open(tmp_path / "model.safetensors")
