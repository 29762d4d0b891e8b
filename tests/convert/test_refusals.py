"""What is refused, with which sentence, and that nothing is written or touched."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

from krasis.convert.journal import encode_line
from krasis.convert.partial import partial_path
from krasis.formats.errors import (
    FormatError,
    KrasisError,
    MismatchError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from krasis.formats.files.file_ops import FileOps
from krasis.formats.process.machine_limits import MemoryLimits


def refuse(run, paths, out, error, match, **settings):
    """Converts, expects the error, and that nothing lies at or beside the output."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.iterdir()}
    with pytest.raises(error, match=match) as caught:
        run(paths, out, **settings)
    assert {path: path.stat().st_mtime_ns for path in out.parent.iterdir()} == before
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "tiny.krasis"


@pytest.fixture
def copy(hf_dir, tmp_path) -> Path:
    return shutil.copytree(hf_dir, tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


class TestInputs:
    def test_nothing_there(self, run, out):
        refuse(run, [Path("/nowhere")], out, UsageError, "no such file or folder")

    def test_two_of_a_kind(self, run, hf_dir, q8_gguf, out):
        refuse(run, [hf_dir, hf_dir], out, UsageError, "both inputs are Hugging Face checkpoints")
        refuse(run, [q8_gguf, q8_gguf], out, UsageError, "both inputs are GGUF files")

    def test_three(self, run, hf_dir, out):
        refuse(run, [hf_dir] * 3, out, UsageError, "3 inputs")

    def test_neither_kind(self, run, out, tmp_path):
        other = tmp_path / "notes.gguf"
        other.write_bytes(b"just some text")
        refuse(run, [other], out, FormatError, "neither a GGUF nor a safetensors file")

    def test_empty_folder(self, run, out, tmp_path):
        refuse(run, [tmp_path], out, FormatError, "no config.json")

    def test_config_without_weights(self, run, out, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        refuse(run, [tmp_path], out, FormatError, "no safetensors files")

    def test_bundle_as_input(self, run, bundle, out):
        refuse(run, [bundle.path], out, UsageError, "a Krasis bundle already")

    def test_device(self, run, out):
        refuse(run, [Path("/dev/null")], out, FormatError, "neither a regular file nor a folder")

    def test_file_without_its_config(self, run, hf_dir, out, tmp_path):
        lone = shutil.copy(next(hf_dir.glob("*.safetensors")), tmp_path / "lone.safetensors")
        refuse(run, [Path(lone)], out, UsageError, "no config.json beside")


class TestModels:
    def test_unknown_architecture_names_the_supported(self, run, copy, out):
        edit_config(copy, model_type="llama")
        refuse(run, [copy], out, UnsupportedModelError, "qwen3_moe")

    def test_gguf_of_an_unknown_architecture(self, run, out, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refuse(run, [tmp_path / "llama.gguf"], out, UnsupportedModelError, "only models with experts")

    def test_missing_tensor(self, run, model, out, tmp_path):
        weights = {
            k: v for k, v in model.weights.items() if k != "model.layers.1.mlp.experts.2.up_proj.weight"
        }
        hf = type(model)(model.shape, 0, weights).write_hf(tmp_path / "hf")
        refuse(run, [hf], out, FormatError, r"experts\.2\.up_proj\.weight' is missing")

    def test_extra_tensor(self, run, model, out, tmp_path):
        weights = {**model.weights, "model.layers.0.self_attn.q_proj.bias": np.zeros(128, np.float32)}
        hf = type(model)(model.shape, 0, weights).write_hf(tmp_path / "hf")
        refuse(run, [hf], out, UnsupportedModelError, r"q_proj\.bias' is not part")

    def test_rotary_buffers_are_ignored(self, run, model, out, tmp_path):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        weights = {**model.weights, name: np.ones(16, np.float32)}
        run([type(model)(model.shape, 0, weights).write_hf(tmp_path / "hf")], out)
        assert out.exists()

    def test_wrong_shape(self, run, copy, out):
        edit_config(copy, moe_intermediate_size=192)
        error = refuse(run, [copy], out, FormatError, "wrong shape", gpu_group=64)
        assert "gate_proj" in str(error)
        assert "[192, 128]" in str(error)

    def test_shape_off_the_tile(self, run, model_class, shape_class, out, tmp_path):
        hf = model_class(shape_class(intermediate=96)).write_hf(tmp_path / "hf")
        refuse(run, [hf], out, UnsupportedModelError, "96", gpu_group=32)

    def test_group_that_does_not_divide(self, run, model_class, shape_class, out, tmp_path):
        hf = model_class(shape_class(intermediate=192)).write_hf(tmp_path / "hf")
        says = "--gpu-group 128 does not divide.*use --gpu-group 64"
        refuse(run, [hf], out, UsageError, says, gpu_group=128)

    def test_without_a_given_group_one_that_divides_is_chosen(
        self, run, model_class, shape_class, out, tmp_path
    ):
        hf = model_class(shape_class(intermediate=192)).write_hf(tmp_path / "hf")
        run([hf], out)
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["layouts"]["gpu"] == "marlin-u4b8-g64-bf16"
        assert manifest["recipe"]["gpu_group"] == 64

    def test_wrong_dtype(self, run, copy, out):
        path = copy / "model-00001-of-00002.safetensors"
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"dtype": "BF16"', b'"dtype": "I16" ', 1))
        refuse(run, [copy], out, FormatError, "unsupported weight type.*I16")

    @pytest.mark.parametrize(("value", "name"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")])
    def test_not_finite(self, run, model, out, tmp_path, value, name):
        for tensor, row in (
            ("model.layers.1.mlp.experts.3.down_proj.weight", 77),
            ("model.layers.1.self_attn.k_proj.weight", 5),
            ("model.embed_tokens.weight", 99),
            ("model.layers.0.mlp.gate.weight", 2),
        ):
            weights = dict(model.weights)
            weights[tensor] = weights[tensor].copy()
            weights[tensor][row, 3] = value
            hf = type(model)(model.shape, 0, weights).write_hf(tmp_path / f"hf-{name}-{row}")
            with pytest.raises(
                FormatError, match=f"NaN or infinity among the weights.*row {row}\\b"
            ) as caught:
                run([hf], out)
            assert tensor in str(caught.value)
            assert not out.exists()
            shutil.rmtree(partial_path(out))

    def test_truncated_shard(self, run, copy, out):
        path = copy / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refuse(run, [copy], out, FormatError, "model-00002-of-00002")

    def test_missing_shard(self, run, copy, out):
        (copy / "model-00002-of-00002.safetensors").unlink()
        refuse(run, [copy], out, FormatError, "model-00002-of-00002.*missing")


class TestCrossCheck:
    def test_gguf_of_another_model(self, run, hf_dir, model_class, shape_class, out, tmp_path):
        other = model_class(shape_class(), seed=7).write_gguf(tmp_path / "other.gguf")
        error = refuse(run, [hf_dir, other], out, MismatchError, "of another model or version")
        assert "relative error" in str(error)
        assert "Q8_0" in str(error)

    def test_gguf_of_another_shape(self, run, hf_dir, model_class, shape_class, out, tmp_path):
        other = model_class(shape_class(layers=1)).write_gguf(tmp_path / "other.gguf")
        refuse(run, [hf_dir, other], out, MismatchError, "num_layers differs.*got 1; limit 2")

    @pytest.mark.parametrize(
        "tensor",
        [
            "model.layers.1.input_layernorm.weight",
            "model.layers.0.mlp.gate.weight",
            "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.0.self_attn.o_proj.weight",
            "lm_head.weight",
        ],
    )
    def test_one_tensor_of_a_fine_tuned_relative(self, run, hf_dir, model, out, tmp_path, tensor):
        weights = dict(model.weights)
        noise = np.random.default_rng(3).standard_normal(weights[tensor].shape).astype(np.float32)
        weights[tensor] = weights[tensor] * (1 + 0.05 * noise)
        other = type(model)(model.shape, 0, weights).write_gguf(tmp_path / "other.gguf")
        error = refuse(run, [hf_dir, other], out, MismatchError, "weights are not those of")
        assert tensor in str(error)

    def test_every_type_that_the_package_quantises_passes(self, run, hf_dir, model, tmp_path):
        for dtype in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"):
            path = model.write_gguf(tmp_path / f"{dtype}.gguf", experts=dtype, dense=dtype)
            run([hf_dir, path], tmp_path / f"{dtype}.krasis", tiers=("cpu",))


class TestOutput:
    def test_exists(self, run, hf_dir, bundle, out):
        shutil.copytree(bundle.path, out)
        refuse(run, [hf_dir], out, UsageError, "exists already.*--force")
        refuse(run, [hf_dir], out, UsageError, "exists already")

    def test_force_replaces_a_bundle(self, run, hf_dir, q8_gguf, bundle, out):
        first = run([hf_dir], out)
        assert first.files() != bundle.files()
        assert run([hf_dir, q8_gguf], out, replace=True).files() == bundle.files()
        assert [path.name for path in out.parent.iterdir()] == [out.name]

    def test_force_does_not_replace_other_things(self, run, hf_dir, out):
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        refuse(run, [hf_dir], out, UsageError, "not touched", replace=True)
        out2 = out.with_name("file")
        out2.write_text("x")
        refuse(run, [hf_dir], out2, UsageError, "not touched", replace=True)

    def test_inside_an_input(self, run, copy, out):
        refuse(run, [copy], copy / "tiny.krasis", UsageError, "inside an input")

    def test_no_name(self, run, hf_dir, tmp_path, monkeypatch):
        with pytest.raises(UsageError, match="needs a name"):
            run([hf_dir], Path("/"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(UsageError, match="exists already"):
            run([hf_dir], Path())
        with pytest.raises(UsageError, match="not touched"):
            run([hf_dir], Path(), replace=True)

    def test_no_parent(self, run, hf_dir, tmp_path):
        with pytest.raises(UsageError, match="does not exist"):
            run([hf_dir], tmp_path / "a" / "b.krasis")

    def test_foreign_partial_folder(self, run, hf_dir, out):
        partial_path(out).mkdir()
        (partial_path(out) / "thesis.tex").write_text("years of work")
        refuse(run, [hf_dir], out, UsageError, "thesis.tex", restart=True)
        assert (partial_path(out) / "thesis.tex").exists()


class TestResources:
    def test_disk_full(self, run, hf_dir, out, monkeypatch):
        real = os.statvfs

        def small(path):
            values = list(real(path))
            values[4] = 10  # f_bavail
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", small)
        refuse(run, [hf_dir], out, ResourceError, "not enough disk space")

    def test_disk_that_fills_up_meanwhile(self, run, hf_dir, out):
        class Full(FileOps):
            def fallocate(self, fd, num_bytes):
                raise OSError(28, "No space left on device")

        with pytest.raises(ResourceError, match="No space left"):
            run([hf_dir], out, io=Full())
        assert not out.exists()

    def test_memory_limit_too_small(self, run, hf_dir, out):
        refuse(run, [hf_dir], out, ResourceError, "memory limit is too small", memory_limit_bytes=1 << 20)

    def test_machine_too_small(self, run, hf_dir, out, monkeypatch):
        limits = MemoryLimits(8 << 30, 8 << 30, "all of the RAM", 1 << 20, "the control group's limit")
        monkeypatch.setattr("krasis.convert.resources.memory_limits", lambda: limits)
        # What this process holds counts as to be had: hundreds of megabytes late in a suite.
        monkeypatch.setattr("krasis.convert.resources.anonymous_bytes", lambda: 0)
        refuse(run, [hf_dir], out, ResourceError, "not enough free memory .*within the control group's limit")


class Interrupted(FileOps):
    """Stops at the end, before the bundle gets its name."""

    def rename_noreplace(self, source, target):
        raise KeyboardInterrupt


class TestResume:
    @pytest.fixture
    def begun(self, run, copy, out) -> Path:
        with pytest.raises(KeyboardInterrupt):
            run([copy], out, io=Interrupted())
        return copy

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"gpu_bits": 8}, "gpu bits was 4 and is now 8"),
            ({"gpu_group": 64}, "gpu group was 128 and is now 64"),
            ({"cpu_format": "int4"}, "cpu format was q8 and is now int4"),
            ({"tiers": ("cpu",)}, "tiers was gpu,cpu and is now cpu"),
            ({"shard_bytes": 3 << 20}, "shard bytes was 34359738368 and is now 3145728"),
        ],
    )
    def test_changed_settings(self, run, begun, out, settings, sentence):
        error = refuse(run, [begun], out, MismatchError, sentence, **settings)
        assert "--restart" in str(error)
        run([begun], out, restart=True, **settings)
        assert out.exists()

    def test_changed_source(self, run, begun, out):
        os.utime(begun / "model-00002-of-00002.safetensors", (1, 1))
        refuse(
            run, [begun], out, MismatchError, r"model-00002-of-00002\.safetensors has changed \(time stamp\)"
        )

    def test_changed_text_file(self, run, begun, out):
        path = begun / "tokenizer.json"
        path.write_text(path.read_text().replace('"b"', '"c"'))
        refuse(run, [begun], out, MismatchError, r"the text file tokenizer\.json has changed")

    def test_another_source(self, run, begun, q8_gguf, out):
        refuse(run, [begun, q8_gguf], out, MismatchError, "cpu experts from was hf: BF16")

    def test_shards_that_were_tampered_with(self, run, begun, out):
        shard = partial_path(out) / "gpu-000.safetensors"
        os.truncate(shard, 1000)
        with pytest.raises(MismatchError, match="1000 bytes instead of"):
            run([begun], out)

    def test_a_journal_of_another_version(self, run, begun, out):
        journal = partial_path(out) / "journal.jsonl"
        header = journal.read_bytes().splitlines(keepends=True)[0]
        journal.write_bytes(header + encode_line({"unit": "x", "something": "else"}))
        refuse(run, [begun], out, MismatchError, "begun by another version")
        run([begun], out, restart=True)
        assert out.exists()

    def test_two_at_once(self, run, begun, out):
        with pytest.raises(ResourceError, match="another conversion is writing here"):
            run([begun], out, io=Rival(lambda: run([begun], out)))
        assert not out.exists()
        run([begun], out)
        assert out.exists()

    def test_one_that_is_just_ending(self, run, begun, out):
        """As a child of a killed conversion, which has its descriptors for a moment."""
        fd = os.open(partial_path(out), os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        timer = threading.Timer(0.1, os.close, (fd,))
        timer.start()
        run([begun], out)
        timer.join()
        assert out.exists()


class Rival(FileOps):
    """Starts the same conversion again in the midst of the first."""

    def __init__(self, again):
        self._again = again

    def pwrite(self, fd, data, offset):
        self._again()
        return super().pwrite(fd, data, offset)


def test_every_error_is_ours(run, out):
    with pytest.raises(KrasisError):
        run([], out)
