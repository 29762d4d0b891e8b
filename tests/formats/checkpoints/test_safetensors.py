import json

import numpy as np
import pytest
import safetensors.numpy
from format_builders import safetensors as build
from format_builders import safetensors_of, tensor_entry
from safetensors import SafetensorError, safe_open

from krasis.formats.checkpoints.safetensors import SafetensorsFile, ShardedCheckpoint
from krasis.formats.errors import FormatError

ARRAYS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(5, dtype=np.uint8),
    "c": np.array(2.5, dtype=np.float16),
    "none": np.zeros((0, 7), dtype=np.float32),
    "i": np.arange(6, dtype=np.int64).reshape(3, 2),
}


def test_reads_what_the_reference_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        info = file.tensors[name]
        assert info.shape == array.shape
        assert info.num_bytes == array.nbytes
        assert path.read_bytes()[info.offset_bytes :][: info.num_bytes] == array.tobytes()
        np.testing.assert_array_equal(file.array(name), array)
        assert file.view(name).tobytes() == array.tobytes()
        assert not file.view(name).flags.writeable


def test_bf16_is_read_as_uint16(write):
    torch = pytest.importorskip("torch")
    values = torch.randn(3, 5, dtype=torch.bfloat16)
    path = write("x.safetensors", safetensors_of({"w": ("BF16", values.view(torch.uint16).numpy())}))
    with safe_open(path, "pt") as reference:
        assert torch.equal(reference.get_tensor("w"), values)
    bits = SafetensorsFile.open(path).array("w")
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32), values.float().numpy())


def test_views_outlive_the_file_object(write):
    path = write("x.safetensors", safetensors_of({"w": ("U8", np.arange(100, dtype=np.uint8))}))
    view = SafetensorsFile.open(path).view("w")
    path.unlink()
    assert view.sum() == 4950


def test_release_keeps_the_data_readable(write):
    array = np.arange(100_000, dtype=np.uint8)
    file = SafetensorsFile.open(write("x.safetensors", safetensors_of({"w": ("U8", array)})))
    view = file.view("w")
    assert view.sum(dtype=np.int64) == array.sum(dtype=np.int64)
    file.release("w")
    np.testing.assert_array_equal(view, array)


def test_a_missing_tensor_is_named(write):
    file = SafetensorsFile.open(write("x.safetensors", safetensors_of({"w": ("U8", np.zeros(1, np.uint8))})))
    with pytest.raises(FormatError, match="'nope'"):
        file.view("nope")


HEADERS = [
    {"a": tensor_entry("U8", [4], 0, 4)},
    {"a": tensor_entry("U8", [4], 0, 4), "b": tensor_entry("F32", [0], 4, 4)},
    {"a": tensor_entry("U8", [3], 0, 3)},
    {"a": tensor_entry("U8", [4], 1, 5)},
    {"a": tensor_entry("U8", [2], 0, 2), "b": tensor_entry("U8", [2], 1, 3)},
    {"a": tensor_entry("U8", [2], 0, 2), "b": tensor_entry("U8", [1], 3, 4)},
    {"a": tensor_entry("F32", [1], 0, 4)},
    {"a": tensor_entry("F32", [2], 0, 4)},
    {"a": tensor_entry("X9", [4], 0, 4)},
    {"a": tensor_entry("U8", [-4], 0, 4)},
    {"__metadata__": {"a": "b"}, "a": tensor_entry("U8", [2, 2], 0, 4)},
    {"__metadata__": {"a": 1}, "a": tensor_entry("U8", [2, 2], 0, 4)},
    {},
]


@pytest.mark.parametrize("header", HEADERS, ids=json.dumps)
def test_agrees_with_the_reference_library_on_what_is_sound(write, header):
    path = write("x.safetensors", build(header, bytes(4)))
    try:
        with safe_open(path, "np") as reference:
            expected = set(reference.keys())
    except SafetensorError:
        with pytest.raises(FormatError):
            SafetensorsFile.open(path)
    else:
        assert set(SafetensorsFile.open(path).tensors) == expected


class TestCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        parts = {"one.safetensors": ["a.weight", "b"], "two.safetensors": ["c", "none", "i"]}
        for file, names in parts.items():
            safetensors.numpy.save_file({name: ARRAYS[name] for name in names}, tmp_path / file)
        weight_map = {name: file for file, names in parts.items() for name in names}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    def edit_index(self, folder, change):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    def test_is_one_table_of_tensors(self, folder):
        for where in (folder, folder / "model.safetensors.index.json"):
            checkpoint = ShardedCheckpoint.open(where)
            assert checkpoint.tensors.keys() == ARRAYS.keys()
            assert [file.path.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
            for name, array in ARRAYS.items():
                np.testing.assert_array_equal(checkpoint.array(name), array)
                assert checkpoint.view(name).tobytes() == array.tobytes()
            assert checkpoint.file_of("i").path.name == "two.safetensors"

    def test_links_to_regular_files_are_followed(self, folder, tmp_path_factory):
        cache = tmp_path_factory.mktemp("snapshot")
        for item in folder.iterdir():
            (cache / item.name).symlink_to(item)
        assert ShardedCheckpoint.open(cache).tensors.keys() == ARRAYS.keys()

    def test_a_single_file_needs_no_index(self, folder):
        (folder / "model.safetensors.index.json").unlink()
        (folder / "two.safetensors").unlink()
        assert set(ShardedCheckpoint.open(folder).tensors) == {"a.weight", "b"}
        assert set(ShardedCheckpoint.open(folder / "one.safetensors").tensors) == {"a.weight", "b"}

    def test_several_files_without_index_are_refused(self, folder):
        (folder / "model.safetensors.index.json").unlink()
        with pytest.raises(FormatError, match=r"several.*one.safetensors.*index"):
            ShardedCheckpoint.open(folder)

    def test_a_missing_shard_is_named(self, folder):
        (folder / "two.safetensors").unlink()
        with pytest.raises(FormatError, match=r"'two.safetensors' is missing.*download may be incomplete"):
            ShardedCheckpoint.open(folder)

    def test_a_truncated_shard_says_where_it_ends(self, folder):
        path = folder / "one.safetensors"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(FormatError, match=f"ends at {size - 10}, its header needs {size}.*incomplete"):
            ShardedCheckpoint.open(folder)

    def test_a_tensor_that_its_shard_lacks(self, folder):
        self.edit_index(folder, lambda table: table.update(ghost="one.safetensors"))
        with pytest.raises(FormatError, match=r"'ghost'.*one.safetensors"):
            ShardedCheckpoint.open(folder)

    def test_a_tensor_that_the_index_lacks(self, folder):
        self.edit_index(folder, lambda table: table.pop("i"))
        assert "i" in ShardedCheckpoint.open(folder).tensors  # as in transformers, which reads whole shards

    def test_an_empty_directory(self, tmp_path):
        with pytest.raises(FormatError, match="no safetensors"):
            ShardedCheckpoint.open(tmp_path)
