import time

import gguf
import numpy as np
import pytest
from format_builders import ARRAY, BOOL, F64, I8, STRING, U8, U16, Gguf, gguf_pair, gguf_record, small_gguf

from krasis.formats.checkpoints.gguf import GgufCheckpoint, GgufFile
from krasis.formats.errors import FormatError

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write_reference(path, arrays, pairs=(), **options):
    """A file by the reference writer; arrays: name -> (array, type or None)."""
    writer = gguf.GGUFWriter(path, "qwen3moe", **options)
    for method, *arguments in pairs:
        getattr(writer, method)(*arguments)
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def arrays():
    rng = np.random.default_rng(1)
    return {
        "f": (rng.standard_normal((3, 5)).astype(np.float32), None),
        "experts": (gguf.quants.quantize(rng.standard_normal((4, 3, 64)).astype(np.float32), Q8_0), Q8_0),
        "half": (rng.standard_normal(7).astype(np.float16), None),
    }


def test_reads_what_the_reference_library_writes(tmp_path, arrays):
    pairs = [
        ("add_bool", "x.bool", True),
        ("add_float32", "x.f32", 1.5),
        ("add_int8", "x.i8", -3),
        ("add_uint64", "x.u64", 2**63 + 5),
        ("add_float64", "x.f64", 1e300),
        ("add_string", "x.s", "héllo\n"),
        ("add_array", "x.ints", [1, -2, 3]),
        ("add_array", "x.strings", ["a", "", "ß"]),
        ("add_custom_alignment", 128),
    ]
    path = write_reference(tmp_path / "x.gguf", arrays, pairs)
    file = GgufFile.open(path)
    assert {key: file.metadata[key] for key in file.metadata if key.startswith("x.")} == {
        "x.bool": True, "x.f32": 1.5, "x.i8": -3, "x.u64": 2**63 + 5, "x.f64": 1e300, "x.s": "héllo\n",
        "x.ints": [1, -2, 3], "x.strings": ["a", "", "ß"],
    }  # fmt: skip
    assert file.tensors["experts"].shape == (4, 3, 64)
    assert file.tensors["experts"].ggml_type == "Q8_0"
    for tensor in gguf.GGUFReader(path).tensors:
        assert file.tensors[tensor.name].offset_bytes == tensor.data_offset
        assert file.view(tensor.name).tobytes() == tensor.data.tobytes()
        assert not file.view(tensor.name).flags.writeable


def test_values_the_reference_writer_rarely_writes(write):
    pairs = [
        gguf_pair("b", ARRAY, (BOOL, [1, 0, 1])),
        gguf_pair("n", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"]), (F64, [])])),
        gguf_pair("i", I8, -1),
        gguf_pair("u", ARRAY, (U16, [65535])),
    ]
    metadata = GgufFile.open(write("x.gguf", Gguf(pairs=pairs).build())).metadata
    assert metadata == {"b": [True, False, True], "n": [[1, 2], ["x"], []], "i": -1, "u": [65535]}
    assert metadata["b"][0] is True


def test_a_large_vocabulary_is_read_fast(tmp_path):
    tokens = [f"tok{i}" * (i % 4 + 1) for i in range(152_000)]
    merges = [f"a{i} b{i}" for i in range(151_000)]
    path = write_reference(
        tmp_path / "x.gguf",
        {},
        [("add_token_list", tokens), ("add_token_merges", merges), ("add_token_types", [1] * 152_000)],
    )
    start = time.process_time()
    file = GgufFile.open(path)
    assert time.process_time() - start < 1.5
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert file.metadata["tokenizer.ggml.merges"] == merges


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path, arrays):
        write_reference(tmp_path / "m.gguf", arrays, split_max_tensors=1)
        return sorted(tmp_path.glob("m-*.gguf"))

    def test_any_part_opens_the_whole(self, parts, arrays, tmp_path):
        assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        for start in (*parts, tmp_path):
            checkpoint = GgufCheckpoint.open(start)
            assert [file.path for file in checkpoint.files] == parts
            assert checkpoint.tensors.keys() == arrays.keys()
            assert checkpoint.metadata["general.architecture"] == "qwen3moe"
            for name, (array, _) in arrays.items():
                assert checkpoint.view(name).tobytes() == array.tobytes()

    def test_a_missing_part_is_named(self, parts):
        parts[1].unlink()
        with pytest.raises(FormatError, match=r"'m-00002-of-00003.gguf' is missing"):
            GgufCheckpoint.open(parts[0])

    def test_swapped_parts_are_noticed(self, parts, tmp_path):
        parts[1].rename(tmp_path / "t")
        parts[2].rename(parts[1])
        (tmp_path / "t").rename(parts[2])
        with pytest.raises(FormatError, match="not the part that its name says"):
            GgufCheckpoint.open(parts[0])

    def test_a_renamed_part_alone_is_not_the_model(self, parts, tmp_path):
        parts[0].rename(tmp_path / "model.gguf")
        with pytest.raises(FormatError, match=r"part int 0 of int 3.*original names"):
            GgufCheckpoint.open(tmp_path / "model.gguf")

    def test_the_same_tensor_in_two_parts(self, write):
        for number in (1, 2):
            pairs = [gguf_pair("split.count", U16, 2), gguf_pair("split.no", U16, number - 1)]
            data = Gguf(pairs=pairs, records=[gguf_record("w", [4], 0, 0)], data=bytes(16)).build()
            path = write(f"m-0000{number}-of-00002.gguf", data)
        with pytest.raises(FormatError, match="two parts have the same tensor"):
            GgufCheckpoint.open(path)


def test_several_models_in_a_directory(write, tmp_path):
    write("a.gguf", small_gguf().build())
    write("b.gguf", small_gguf().build())
    with pytest.raises(FormatError, match=r"several GGUF models.*a\.gguf, b\.gguf"):
        GgufCheckpoint.open(tmp_path)


def test_every_prefix_of_a_file_is_refused(write):
    """Cut anywhere, a file is reported as damaged; nothing else escapes."""
    data = small_gguf().build()
    for length in [*range(0, len(data) - 26_000, 7), len(data) - 1]:
        with pytest.raises(FormatError):
            GgufFile.open(write("x.gguf", data[:length]))
    assert set(GgufFile.open(write("x.gguf", data)).tensors) == {"token_embd.weight", "blocks"}
