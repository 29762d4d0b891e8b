import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
from format_builders import ASSETS, SPECS, architecture, blob_data, manifest_of, write_bundle, write_partial
from safetensors import safe_open

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.shard_plan import BlobSpec
from krasis.formats.bundle.verify import verify_bundle, verify_bytes
from krasis.formats.bundle.writer import BundleWriter, plan_shards
from krasis.formats.errors import FormatError, KrasisError, MismatchError, UsageError
from krasis.formats.files import folder_snapshot
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from tests.support.patience import PATIENCE_S

NUMPY = {"U8": np.uint8, "I8": np.int8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def test_every_blob_comes_back_typed_and_shaped(bundle):
    with Bundle.open(bundle) as opened:
        assert opened.architecture == architecture()
        for spec in SPECS:
            array = opened.map(spec.name)
            assert array.shape == spec.shape
            assert array.dtype == NUMPY[spec.dtype]
            assert not array.flags.writeable
            assert array.tobytes() == blob_data(spec).tobytes()
            assert opened.blob(spec.name).num_bytes == spec.num_bytes
        for name, data in ASSETS.items():
            assert opened.asset(name) == data


def test_the_reference_library_opens_every_shard(bundle):
    specs = {spec.name: spec for spec in SPECS}
    seen = set()
    for path in sorted(bundle.glob("*.safetensors")):
        with safe_open(path, "np") as shard:
            names = set(shard.keys())
            assert shard.metadata()["tier"] == path.name.split("-")[0]
            for name in names & specs.keys():
                if specs[name].dtype != "BF16":  # which the library's NumPy side lacks
                    assert shard.get_tensor(name).tobytes() == blob_data(specs[name]).tobytes()
            assert all(name.startswith("_padding.") for name in names - specs.keys())
            seen |= names
    assert specs.keys() <= seen
    loaded = safetensors.numpy.load_file(bundle / "cpu-000.safetensors")
    assert not loaded["_padding.0"].any()


def test_bf16_shards_load_in_torch(bundle):
    torch = pytest.importorskip("torch")
    with safe_open(bundle / "dense-000.safetensors", "pt") as shard:
        bits = shard.get_tensor("embedding").view(torch.uint16).numpy()
    assert bits.tobytes() == blob_data(SPECS[0]).tobytes()


def test_expert_blobs_are_mapped_at_huge_page_boundaries(bundle):
    with Bundle.open(bundle) as opened:
        for blob in opened.manifest.blobs:
            address, num_bytes = opened.mapping_of(blob.file)
            assert address % HUGE_PAGE_BYTES == 0
            assert num_bytes == (bundle / blob.file).stat().st_size
            if blob.tier != "dense":
                assert blob.offset_bytes % HUGE_PAGE_BYTES == 0
                assert opened.map(blob.name).ctypes.data == address + blob.offset_bytes


def test_views_outlive_the_bundle(bundle):
    opened = Bundle.open(bundle)
    view = opened.map("layers.0.experts.cpu")
    opened.close()
    shutil.rmtree(bundle)
    assert view.tobytes() == blob_data(SPECS[4]).tobytes()
    with pytest.raises(UsageError, match="closed"):
        opened.map("layers.0.experts.cpu")


def test_closing_waits_for_no_reader_and_breaks_none(bundle, monkeypatch):
    """A reader in another thread ends its reading; the number of a file is not another file's meanwhile."""
    opened = Bundle.open(bundle)
    inside, leave = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        inside.set()
        assert leave.wait(PATIENCE_S)
        return read_small_file(*arguments, **options)

    monkeypatch.setattr("krasis.formats.bundle.reader.read_small_file", slow)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(opened.asset, "config.json")
        assert inside.wait(PATIENCE_S)
        opened.close()
        opened.close()
        held = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(UsageError, match="closed"):
            opened.asset("config.json")
        leave.set()
        assert reading.result(20) == ASSETS["config.json"]
    # Now, and not before, its files are closed.
    assert len(held - set(os.listdir("/proc/self/fd"))) >= 2  # noqa: PTH208
    for call in (opened.entries, lambda: opened.mapping_of("dense-000.safetensors")):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(UsageError, match="closed"):
        opened.read_file_range("dense-000.safetensors", 0, 8)


def test_unknown_names(bundle):
    with Bundle.open(bundle) as opened:
        for call in (opened.blob, opened.map, opened.asset):
            with pytest.raises(FormatError, match="'nope'"):
                call("nope")


def test_prefault_counts_a_tier(bundle):
    with Bundle.open(bundle) as opened:
        assert opened.prefault("cpu", 2) == 2 * 4 * 12288
        assert opened.prefault("nothing", 1) == 0


def test_bundles_of_the_same_data_are_identical(tmp_path):
    one, two = write_bundle(tmp_path / "one"), write_bundle(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert names == ["config.json.zst", "cpu-000.safetensors", "dense-000.safetensors", "gpu-000.safetensors",
                     "manifest.json", "tokenizer.json.zst"]  # fmt: skip


@pytest.mark.parametrize("piece", [1000, 4096, MIB + 1, 2 * MIB, 5 * MIB + 3, 64 * MIB])
def test_any_size_of_writes_gives_the_same_file(tmp_path, piece):
    spec = BlobSpec("a", "cpu", "U8", (9 * MIB + 17,), "plain")
    data = np.random.default_rng(0).integers(0, 256, spec.num_bytes, dtype=np.uint8)
    if piece == 1000:
        data, spec = data[:100_000], BlobSpec("a", "cpu", "U8", (100_000,), "plain")
    plan = plan_shards([BlobSpec("first", "cpu", "U8", (5,), "plain"), spec])
    with BundleWriter(tmp_path / "x.partial", plan) as writer:
        writer.create()
        with writer.open_blob("a") as sink:
            for begin in range(0, len(data), piece):
                sink.write(data[begin : begin + piece])
            digest = sink.close()
            assert sink.close() == digest
    import xxhash

    assert digest == xxhash.xxh3_128_hexdigest(data)
    raw = (tmp_path / "x.partial" / "cpu-000.safetensors").read_bytes()
    assert raw[4 * MIB :][: len(data)] == data.tobytes()
    assert not any(raw[2 * MIB : 4 * MIB])
    assert not any(raw[4 * MIB + len(data) :])


def test_large_writes_end_at_huge_page_boundaries(tmp_path):
    """The page cache keeps a file in huge pages only if it is written so."""
    from krasis.formats.files.file_ops import FileOps

    class Recorder(FileOps):
        writes: list[tuple[int, int]] = []  # noqa: RUF012 -- one test

        def pwrite(self, fd, data, offset):
            self.writes.append((offset, len(data)))
            return super().pwrite(fd, data, offset)

    plan = plan_shards([BlobSpec("a", "cpu", "U8", (20, MIB), "plain")])
    with BundleWriter(tmp_path / "x.partial", plan, io=Recorder()) as writer:
        writer.create()
        Recorder.writes.clear()
        with writer.open_blob("a") as sink:
            for _ in range(4):
                sink.write(np.ones(5 * MIB, np.uint8))
            sink.close()
    assert sum(num_bytes for _, num_bytes in Recorder.writes) == 20 * MIB
    assert all(
        offset % HUGE_PAGE_BYTES == 0 and num_bytes % HUGE_PAGE_BYTES == 0
        for offset, num_bytes in Recorder.writes
    )


class TestSink:
    @pytest.fixture
    def writer(self, tmp_path):
        with BundleWriter(tmp_path / "x.partial", plan_shards(SPECS)) as writer:
            writer.create()
            yield writer

    def test_too_much(self, writer):
        with (
            writer.open_blob("embedding") as sink,
            pytest.raises(FormatError, match=r"'embedding'.*got 12801.*limit 12800"),
        ):
            sink.write(bytes(12801))

    def test_too_little(self, writer):
        with writer.open_blob("embedding") as sink:
            sink.write(bytes(100))
            sink.write(b"")
            with pytest.raises(FormatError, match=r"incomplete.*got 100.*limit 12800"):
                sink.close()

    def test_unknown_and_twice(self, writer):
        with pytest.raises(FormatError, match="'nope'"):
            writer.open_blob("nope")
        with writer.open_blob("embedding"), pytest.raises(FormatError, match="already"):
            writer.open_blob("embedding")
        writer.open_blob("embedding")

    def test_a_given_up_blob_can_be_written_again(self, writer):
        with writer.open_blob("embedding") as sink:
            sink.write(np.ones(4096, np.uint8))
        with writer.open_blob("embedding") as sink:
            sink.write(blob_data(SPECS[0]).reshape(100, 128))
            sink.close()
            with pytest.raises(FormatError, match="closed"):
                sink.write(b"1")
        writer.sync_blob("embedding")


class TestResume:
    def test_reopened_shards_take_the_missing_blobs(self, tmp_path):
        complete = write_bundle(tmp_path / "complete")
        plan = plan_shards(SPECS)
        partial = tmp_path / "m.partial"
        digests = {}
        with BundleWriter(partial, plan) as writer:
            writer.create()
            for spec in SPECS[:3]:
                with writer.open_blob(spec.name) as sink:
                    sink.write(blob_data(spec))
                    digests[spec.name] = sink.close()
            with writer.open_blob(SPECS[3].name) as sink:
                sink.write(bytes(5000))  # interrupted
        with BundleWriter(partial, plan) as writer:
            writer.reopen()
            for spec in SPECS[3:]:
                with writer.open_blob(spec.name) as sink:
                    sink.write(blob_data(spec))
                    digests[spec.name] = sink.close()
            assets = [writer.write_asset(name, data) for name, data in ASSETS.items()]
            writer.finish(manifest_of(plan, digests, assets), tmp_path / "m")
        for path in complete.iterdir():
            assert path.read_bytes() == (tmp_path / "m" / path.name).read_bytes()

    def test_other_shards_are_refused(self, tmp_path):
        partial = tmp_path / "m.partial"
        with BundleWriter(partial, plan_shards(SPECS)) as writer:
            writer.create()
        for change in (lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()):
            change(partial / "gpu-000.safetensors")
            with (
                BundleWriter(partial, plan_shards(SPECS)) as writer,
                pytest.raises(MismatchError, match="gpu-000"),
            ):
                writer.reopen()

    def test_another_plan_is_refused(self, tmp_path):
        with BundleWriter(tmp_path / "m.partial", plan_shards(SPECS)) as writer:
            writer.create()
        other = [*SPECS[1:], BlobSpec("embedding", "dense", "F16", (100, 64), "plain")]
        with BundleWriter(tmp_path / "m.partial", plan_shards(other)) as writer, pytest.raises(MismatchError):
            writer.reopen()


class TestFinish:
    def test_existing_output_is_not_touched_without_replace(self, tmp_path, bundle):
        before = {path.name: path.read_bytes() for path in bundle.iterdir()}
        writer, manifest = write_partial(bundle.with_name("model.krasis.partial"))
        with writer, pytest.raises(UsageError, match=r"exists already.*--force"):
            writer.finish(manifest, bundle)
        assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
        writer.finish  # noqa: B018 -- a repeated finish needs a reopened writer
        again = BundleWriter(writer.path, writer.plan)
        again.reopen()
        again.finish(manifest, bundle, replace=True)
        assert verify_bundle(bundle) == []
        assert not writer.path.exists()

    def test_replace_refuses_anything_but_a_bundle(self, tmp_path):
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").write_text("years of work")
        link = tmp_path / "link"
        link.symlink_to(home)
        for target in (home, link):
            writer, manifest = write_partial(tmp_path / "m.partial")
            with writer, pytest.raises(UsageError, match="not touched"):
                writer.finish(manifest, target, replace=True)
            shutil.rmtree(tmp_path / "m.partial")
        assert (home / "thesis.tex").exists()

    def test_a_bundle_with_a_strange_file_is_not_replaced(self, tmp_path, bundle):
        (bundle / "notes.txt").write_text("mine")
        writer, manifest = write_partial(tmp_path / "m.partial")
        with writer, pytest.raises(UsageError, match=r"notes\.txt"):
            writer.finish(manifest, bundle, replace=True)
        assert (bundle / "notes.txt").exists()

    def test_without_exchange_the_old_bundle_is_moved_aside(self, tmp_path, bundle):
        from krasis.formats.files.file_ops import FileOps

        class OldFileSystem(FileOps):
            def rename_exchange(self, one, other):
                return False

        (bundle / "journal.jsonl").write_text("left over")
        writer, manifest = write_partial(tmp_path / "m.partial", OldFileSystem())
        with writer:
            writer.finish(manifest, bundle, replace=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.krasis"]
        assert verify_bundle(bundle) == []
        assert not (bundle / "journal.jsonl").exists()

    def test_scratch_files_disappear(self, tmp_path):
        writer, manifest = write_partial(tmp_path / "m.partial")
        (writer.path / "journal.jsonl").write_text("x")
        with writer:
            writer.finish(manifest, tmp_path / "m", scratch=("journal.jsonl", "never-made"))
        assert not (tmp_path / "m" / "journal.jsonl").exists()
        assert verify_bundle(tmp_path / "m") == []

    def test_a_manifest_of_something_else_is_refused(self, tmp_path):
        import dataclasses

        writer, manifest = write_partial(tmp_path / "m.partial")
        with writer, pytest.raises(MismatchError):
            writer.finish(dataclasses.replace(manifest, blobs=manifest.blobs[1:]), tmp_path / "m")
        with BundleWriter(writer.path, writer.plan) as again:
            again.reopen()
            again.open_blob("embedding")
            with pytest.raises(FormatError, match="still being written"):
                again.finish(manifest, tmp_path / "m")
        assert not (tmp_path / "m").exists()


class TestUnfinished:
    def test_a_partial_directory_says_what_to_do(self, tmp_path):
        writer, _ = write_partial(tmp_path / "m.krasis.partial")
        writer.close()
        for path in (writer.path, tmp_path / "m.krasis"):
            with pytest.raises(
                FormatError, match="incomplete; run the same krasis-convert command to resume"
            ):
                Bundle.open(path)
        writer.path.rename(tmp_path / "renamed")
        with pytest.raises(FormatError, match="incomplete; run the same"):
            Bundle.open(tmp_path / "renamed")

    def test_other_paths(self, tmp_path):
        with pytest.raises(FormatError, match="no such bundle"):
            Bundle.open(tmp_path / "nothing")
        with pytest.raises(FormatError, match="no manifest"):
            Bundle.open(tmp_path)
        (tmp_path / "file").write_text("x")
        with pytest.raises(FormatError, match="not a directory"):
            Bundle.open(tmp_path / "file")


class TestVerify:
    def test_an_intact_bundle(self, bundle):
        seen = []
        assert verify_bundle(bundle, seen.append, num_threads=2) == []
        with Bundle.open(bundle) as opened:
            assert sum(seen) == verify_bytes(opened)

    def test_a_flipped_byte_anywhere_is_found(self, bundle, monkeypatch):
        monkeypatch.setattr(folder_snapshot, "_TICK_S", 0.0)  # nobody else writes here: no need to wait
        rng = np.random.default_rng(5)
        for path in sorted(bundle.iterdir()):
            data = path.read_bytes()
            positions = {0, 7, 8, 100 % len(data), len(data) - 1, *rng.integers(0, len(data), 6).tolist()}
            for position in positions:
                altered = bytearray(data)
                altered[position] ^= 1 << int(rng.integers(8))
                path.write_bytes(altered)
                problems = verify_bundle(bundle, num_threads=1)
                assert problems, f"{path.name} at {position}"
                assert path.name in problems[0].where
            path.write_bytes(data)
        assert verify_bundle(bundle) == []

    def test_every_kind_of_place_is_named(self, bundle):
        with Bundle.open(bundle) as opened:
            blob = opened.blob("layers.1.experts.cpu")
        path = bundle / blob.file
        data = bytearray(path.read_bytes())
        data[blob.offset_bytes + 5] ^= 1
        data[blob.offset_bytes + blob.num_bytes] ^= 1  # the filler behind it
        path.write_bytes(data)
        (bundle / "stray.bin").write_bytes(b"x")
        (bundle / ".DS_Store").write_bytes(b"x")
        problems = [str(problem) for problem in verify_bundle(bundle)]
        assert len(problems) == 3
        assert any("layers.1.experts.cpu: data was altered" in text for text in problems)
        assert any("_padding.1: padding was altered" in text for text in problems)
        assert any("stray.bin" in text and "not part of the bundle" in text for text in problems)

    def test_a_missing_shard_is_one_problem(self, bundle):
        (bundle / "gpu-000.safetensors").unlink()
        (problem,) = verify_bundle(bundle)
        assert "gpu-000.safetensors" in problem.where
        assert "missing" in problem.what


def test_errors_are_krasis_errors():
    with pytest.raises(KrasisError):
        Bundle.open("/nonexistent/bundle")
