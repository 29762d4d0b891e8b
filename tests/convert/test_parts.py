"""Small parts on their own: settings, memory plan, journal lines, digests, estimates, reports, tokenizers."""

from __future__ import annotations

import dataclasses
import json
import re

import h5py
import numpy as np
import pytest
import xxhash
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from krasis.convert import resources
from krasis.convert.conversion import prepare
from krasis.convert.crosscheck import error_limit, spread
from krasis.convert.digests import ContentDigests
from krasis.convert.importance import load_calibration
from krasis.convert.inputs import recognise
from krasis.convert.journal import decode_lines, encode_line
from krasis.convert.partial import describe_difference
from krasis.convert.plan import plan_memory
from krasis.convert.progress import Reporter
from krasis.convert.quality import UnitQuality, manifest_quality, report_bytes
from krasis.convert.settings import ConvertSettings, parse_tiers
from krasis.convert.slices import TensorSlice
from krasis.convert.text_assets import assets_from_gguf
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.ggml_blocks import SUPPORTED_TYPES
from krasis.formats.errors import FormatError, ResourceError, UnsupportedModelError, UsageError
from krasis.formats.layouts import PackStats
from krasis.formats.models.uniform import architecture_of, spec_of


def test_tiers_in_any_order():
    assert parse_tiers("cpu, gpu") == ("gpu", "cpu")
    assert parse_tiers("cpu") == ("cpu",)
    with pytest.raises(UsageError):
        parse_tiers(" ,")


def test_recognise_says_how_many():
    with pytest.raises(UsageError, match="0 inputs"):
        recognise([])


def test_spread_takes_first_and_last():
    assert spread(94, 6) == [0, 19, 37, 56, 74, 93]
    assert spread(3, 6) == [0, 1, 2]


def test_every_readable_type_has_a_limit_below_unrelated_weights():
    assert all(0 < error_limit(dtype) < 1 for dtype in SUPPORTED_TYPES)


def test_memory_of_the_largest_model_stays_under_a_gigabyte(hf_dir, q8_gguf, tmp_path):
    prepared = prepare([hf_dir, q8_gguf], tmp_path / "o", ConvertSettings(), Reporter(0))
    large = dataclasses.replace(
        architecture_of(prepared.plan.spec, "x"),
        num_layers=94,
        hidden_size=4096,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        expert_intermediate_size=1536,
        vocab_size=151936,
    )
    source = prepared.plan.dense_source
    memory = plan_memory(spec_of(large), ConvertSettings(), source, source)
    assert memory.total_bytes < 1 << 30
    assert memory.staging_slots >= 4
    tight = plan_memory(spec_of(large), ConvertSettings(memory_limit_bytes=535 << 20), source, source)
    assert tight.staging_slots == 2
    assert tight.slot_bytes < memory.slot_bytes
    assert tight.total_bytes <= 535 << 20
    with pytest.raises(ResourceError, match="needed"):
        plan_memory(spec_of(large), ConvertSettings(memory_limit_bytes=300 << 20), source, source)


class TestJournal:
    RECORDS = ({"a": 1}, {"b": [1.5, "x"]}, {"c": {}})

    def test_lines_survive(self):
        data = b"".join(map(encode_line, self.RECORDS))
        assert decode_lines(data) == (list(self.RECORDS), len(data))

    def test_cut_anywhere_only_whole_lines_count(self):
        lines = [encode_line(record) for record in self.RECORDS]
        data = b"".join(lines)
        ends = np.cumsum([len(line) for line in lines])
        for cut in range(len(data) + 1):
            whole = int((ends <= cut).sum())
            assert decode_lines(data[:cut]) == (list(self.RECORDS[:whole]), sum(map(len, lines[:whole])))

    def test_a_flipped_byte_ends_it(self):
        lines = [encode_line(record) for record in self.RECORDS]
        data = bytearray(b"".join(lines))
        for position in range(len(lines[0]), len(lines[0]) + len(lines[1])):
            flipped = bytearray(data)
            flipped[position] ^= 1
            assert decode_lines(bytes(flipped))[0] == [self.RECORDS[0]], position

    def test_zeros_after_a_power_cut_end_it(self):
        data = encode_line(self.RECORDS[0])
        assert decode_lines(data + b"\0" * 100 + b"\n") == ([self.RECORDS[0]], len(data))


class TestDigests:
    @staticmethod
    def piece(data, start, stop):
        return TensorSlice(
            "t", "t", "F32", (stop - start, 1), data[start * 4 : stop * 4], start * 4, data.nbytes
        )

    def test_slices_in_order_give_the_tensors_digest(self):
        data = np.arange(40, dtype=np.uint8)
        digests = ContentDigests()
        for start, stop in ((0, 3), (3, 4), (0, 3), (4, 10), (0, 10)):  # some are read twice
            digests.add("hf", self.piece(data, start, stop))
        assert digests.take_new([]) == {"hf:t": xxhash.xxh3_128_hexdigest(data.tobytes())}
        assert digests.take_new(["hf:t"]) == {}

    def test_unfinished_tensors_do_not_count(self):
        digests = ContentDigests()
        digests.add("hf", self.piece(np.arange(40, dtype=np.uint8), 0, 3))
        assert digests.combined("hf", ["t"]) is None

    def test_combined_depends_on_names_and_order_only(self):
        one, other = ContentDigests(), ContentDigests()
        one.restore({"hf:a": "1", "hf:b": "2", "gguf:a": "3"})
        other.restore({"hf:b": "2", "hf:a": "1"})
        assert one.combined("hf", ["a", "b"]) == other.combined("hf", ["b", "a", "c"])
        assert one.combined("hf", ["a"]) != one.combined("gguf", ["a"])


class TestQuality:
    def test_totals_and_json(self):
        units = [UnitQuality(0), UnitQuality(1)]
        for unit in units:
            unit.add("x", PackStats(1.0, 100.0, 0.5, 10))
            unit.add_expert("e", PackStats(2.0, 10.0, 0.25, 4))
        units = [UnitQuality.from_json(unit.to_json()) for unit in units]
        record = manifest_quality(units, {"s": PackStats(0.0, 1.0, 0.0, 1)})
        assert record["x"] == {"relative_mse": 0.01, "max_abs_error": 0.5, "count": 20}
        assert list(record) == ["e", "s", "x"]
        assert report_bytes(units, 2) == report_bytes(units, 2)


def gguf_tokenizer(pad=0):
    """A byte-level BPE and the metadata that a GGUF has of it; special tokens are not the last ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["hello world, hello there 123"] * 5, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    size = tokenizer.get_vocab_size()
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)]
        + [f"[PAD{i}]" for i in range(pad)],
        "tokenizer.ggml.token_type": [1] * (size - 1) + [3] + [5] * pad,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.chat_template": "{{ messages }}",
    }


class TestTokenizer:
    @pytest.mark.parametrize("pad", [0, 7])
    def test_rebuilt_from_a_gguf(self, pad):
        original, metadata = gguf_tokenizer(pad)
        assets = assets_from_gguf(metadata, "x.gguf")
        rebuilt = Tokenizer.from_str(assets["tokenizer.json"].decode())
        text = "hello world<|im_end|>there, été\n"
        ids = rebuilt.encode(text).ids
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids, skip_special_tokens=True) == "hello worldthere, été\n"
        assert rebuilt.get_vocab_size() == original.get_vocab_size()
        assert b'"eos_token": "<|im_end|>"' in assets["tokenizer_config.json"]
        assert str(metadata["tokenizer.ggml.eos_token_id"]).encode() in assets["generation_config.json"]
        assert b'"chat_template": "{{ messages }}"' in assets["tokenizer_config.json"]

    def test_none_in_the_gguf(self):
        assert assets_from_gguf({}, "x.gguf") == {}

    def test_of_an_unknown_kind(self):
        _, metadata = gguf_tokenizer()
        with pytest.raises(UnsupportedModelError, match=r"cannot be rebuilt.*llama-bpe"):
            assets_from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}, "x.gguf")

    def test_damaged(self):
        _, metadata = gguf_tokenizer()
        with pytest.raises(FormatError, match="token types do not match"):
            assets_from_gguf({**metadata, "tokenizer.ggml.token_type": [1]}, "x.gguf")
        with pytest.raises(FormatError, match="does not fit"):
            assets_from_gguf({**metadata, "tokenizer.ggml.merges": ["zzz qqq"]}, "x.gguf")


class TestDifferences:
    def test_nothing(self):
        assert describe_difference({"recipe": {"a": 1}}, {"recipe": {"a": 1}}) is None

    @pytest.mark.parametrize(
        ("old", "new", "text"),
        [
            ({"tool_version": "1"}, {"tool_version": "2"}, "begun by version 1, this is 2"),
            ({"sources": {"hf": []}}, {"sources": {}}, "begun with a Hugging Face checkpoint too"),
            (
                {"sources": {"gguf": [{"name": "a", "num_bytes": 1}]}},
                {"sources": {"gguf": [{"name": "a", "num_bytes": 2}]}},
                r"source file a has changed \(size\)",
            ),
            (
                {"sources": {"gguf": [{"name": "a"}]}},
                {"sources": {"gguf": [{"name": "b"}]}},
                "source file a was there when it began",
            ),
            ({"plan": "1"}, {"plan": "2"}, "layout"),
            ({}, {"recipe": {"a": 1}}, "a was None and is now 1"),
        ],
    )
    def test_is_named(self, old, new, text):
        assert re.search(text, describe_difference(old, new))


class TestCalibration:
    @staticmethod
    def write(path, hidden=128, layers=2, value=1.0):
        with h5py.File(path, "w") as file:
            for i in range(layers):
                rng = np.random.default_rng(i)
                weights = rng.uniform(0.01, 10, (4, hidden)).astype(np.float32) * value
                weights[3] = 0  # never reached
                file[f"layers/{i}/hidden"] = weights
                file[f"layers/{i}/intermediate"] = rng.uniform(0.01, 10, (4, 128)).astype(np.float32)
        return path

    def test_changes_the_gpu_tier_and_is_recorded(self, run, hf_dir, q8_gguf, bundle, tmp_path):
        path = self.write(tmp_path / "importance.h5")
        other = run([hf_dir, q8_gguf], tmp_path / "out.krasis", calibration=path)
        files = other.files()
        assert files["gpu-000.safetensors"] != bundle.files()["gpu-000.safetensors"]
        assert files["cpu-000.safetensors"] == bundle.files()["cpu-000.safetensors"]
        with Bundle.open(other.path) as reader:
            assert len(reader.manifest.recipe["calibration"]) == 32
            record = reader.blob("layers.0.experts.gpu")
        with Bundle.open(bundle.path) as plain, Bundle.open(other.path) as weighted:
            same = [(plain.map(record.name)[e] == weighted.map(record.name)[e]).all() for e in range(4)]
        assert same == [False, False, False, True]

    def test_of_another_model(self, hf_dir, q8_gguf, tmp_path, run):
        for options, text in (
            ({"hidden": 64}, "wrong shape"),
            ({"layers": 1}, "missing"),
            ({"value": np.nan}, "finite"),
        ):
            path = self.write(tmp_path / "importance.h5", **options)
            with pytest.raises(FormatError, match=text):
                run([hf_dir], tmp_path / "out.krasis", calibration=path)
        with pytest.raises(FormatError, match="HDF5"):
            run([hf_dir], tmp_path / "out.krasis", calibration=hf_dir / "config.json")

    def test_links_out_of_the_file_are_refused(self, tmp_path, hf_dir, q8_gguf):
        spec = prepare([hf_dir], tmp_path / "o", ConvertSettings(), Reporter(0)).plan.spec
        real = self.write(tmp_path / "real.h5")
        path = tmp_path / "link.h5"
        with h5py.File(path, "w") as file:
            file["layers"] = h5py.ExternalLink(str(real), "layers")
        with pytest.raises(FormatError, match="missing"):
            load_calibration(path, spec)


class TestMemory:
    def test_this_process_has_some(self):
        block = np.ones(64 << 20, np.uint8)
        assert block.nbytes < resources.anonymous_bytes() < 64 << 30
