"""Conversions that download piece by piece: the same bytes, little on the disk, and they go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from convert_runs import tree_digests

from krasis.convert.conversion import convert, dry_run, prepare
from krasis.convert.hub import fetcher, opening, remote, streamed
from krasis.convert.hub.inputs import opened_inputs, parse_inputs
from krasis.convert.hub.store import SourceStore, sources_path
from krasis.convert.journal import encode_line
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.errors import MismatchError, ResourceError, UsageError
from tests.support.patience import PATIENCE_S

BOTH = ("org/tiny", "org/tiny-GGUF:Q8_0")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(fetcher, "PART_BYTES", 256 << 10)
    monkeypatch.setattr(streamed, "_SLACK_BYTES", 0)
    monkeypatch.setattr(opening, "_FIRST_BYTES", 1 << 14)
    monkeypatch.setattr(remote.RemoteFile.__init__, "__defaults__", (0.001,))


def stream(texts, out, plan_only=False, **settings):
    reporter, chosen = Reporter(1, StringIO()), ConvertSettings(**settings)
    named = parse_inputs(texts)
    with opened_inputs(named, out, reporter, restart=chosen.restart, plan_only=plan_only, drop=True) as (
        paths,
        more,
    ):
        prepared = prepare(paths, out, chosen, reporter, more)
        if plan_only:
            return dry_run(prepared)
        return convert(prepared, reporter)


def fetched_bytes(hub, folders):
    """(what was sent, what the files of folders have)."""
    return hub.sent, sum(path.stat().st_size for folder in folders for path in folder.iterdir())


@pytest.mark.parametrize("names", [BOTH, BOTH[:1], BOTH[1:]])
def test_the_same_bytes_as_of_local_files(run, hub, cache, fast_dir, hf_dir, q8_gguf, names):
    local = [{"org/tiny": hf_dir}.get(name, q8_gguf) for name in names]
    expected = run(local, fast_dir / "local.krasis").files()
    stream(names, fast_dir / "x.krasis")
    assert tree_digests(fast_dir / "x.krasis") == expected
    assert {path.name for path in fast_dir.iterdir()} == {"x.krasis", "local.krasis"}


def test_little_on_the_disk_and_nothing_twice(hub, cache, fast_dir, hf_dir, monkeypatch):
    most, keep = [0], SourceStore.keep

    def counting(self, *arguments):
        keep(self, *arguments)
        most[0] = max(most[0], sum(file.present.num_bytes for file in self.files.values()))

    monkeypatch.setattr(SourceStore, "keep", counting)
    stream(BOTH[:1], fast_dir / "x.krasis")
    size = sum(path.stat().st_size for path in hf_dir.glob("*.safetensors"))
    assert most[0] < 0.67 * size  # a layer at a time, of three, and the headers
    assert (
        hub.sent < 1.45 * size
    )  # what is read back for comparison at the end is a good part of so few experts


def test_killed_at_any_point_it_goes_on(hub, cache, fast_dir, bundle, hf_dir, q8_gguf):
    script = Path(__file__).with_name("kill_streamed.py")
    command = [sys.executable, str(script), "6", "7", str(fast_dir / "x.krasis"), *BOTH]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["statuses"], "no conversion was killed"
    assert set(found["statuses"]) == {-9}, done.stderr
    assert not found["sources_left"]
    assert tree_digests(fast_dir / "x.krasis") == bundle.files()


def test_it_goes_on_with_the_commit_that_it_began_with(
    hub, cache, fast_dir, bundle, copied_model, monkeypatch
):
    out = fast_dir / "x.krasis"
    broken_off(hub, out, monkeypatch)
    old = hub.models["org/tiny"]
    hub.models["org/tiny"] = type(old)(copied_model, revisions={"was main": old.folder})
    monkeypatch.setattr(hub.models["org/tiny"], "at", lambda revision: old.at("main"))
    asked = len(hub.requests)
    stream(BOTH, out)
    assert tree_digests(out) == bundle.files()
    commit = old.at("main")[0]
    assert any(f"/revision/{commit}" in path for _, path, _, _ in hub.requests[asked:])


@pytest.fixture
def copied_model(model, tmp_path):
    return model.write_hf(tmp_path / "other")


def broken_off(hub, out, monkeypatch):
    """A conversion that the network ends in the middle."""
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_MOST_TRIES", 1)
        limit = hub.sent + 1_300_000
        patch.setattr(hub, "count", lambda count: _count_until(hub, count, limit))
        with pytest.raises(ResourceError, match=r"the hub answers with an error.*run the same command again"):
            stream(BOTH, out)
    assert sources_path(out).is_dir()
    hub.failures = 0


def _count_until(hub, count, limit):
    hub.sent += count
    if hub.sent > limit:
        hub.failures = 10_000


def test_what_an_earlier_run_fetched_is_not_fetched_again(
    hub, cache, fast_dir, bundle, monkeypatch, hf_dir, q8_gguf
):
    out = fast_dir / "x.krasis"
    broken_off(hub, out, monkeypatch)
    stream(BOTH, out)
    assert tree_digests(out) == bundle.files()
    assert hub.sent < 1.6 * sum(path.stat().st_size for path in (*hf_dir.iterdir(), q8_gguf))


def test_restart_begins_anew_and_other_settings_are_refused(hub, cache, fast_dir, bundle, monkeypatch):
    out = fast_dir / "x.krasis"
    broken_off(hub, out, monkeypatch)
    with pytest.raises(MismatchError, match="an unfinished conversion is there"):
        stream(BOTH, out, gpu_bits=8)
    stream(BOTH, out, restart=True)
    assert tree_digests(out) == bundle.files()


def test_connections_that_break_and_a_busy_hub(hub, cache, fast_dir, bundle):
    hub.cut_every, hub.failures = 30_000, 3
    stream(BOTH, fast_dir / "x.krasis")
    assert tree_digests(fast_dir / "x.krasis") == bundle.files()


def test_a_token_is_for_the_hub_alone(hub, cache, fast_dir, bundle, monkeypatch):
    for model in hub.models.values():
        model.gated = True
    with pytest.raises(ResourceError, match="people who agreed to its terms"):
        stream(BOTH, fast_dir / "x.krasis")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    stream(BOTH, fast_dir / "x.krasis")
    assert tree_digests(fast_dir / "x.krasis") == bundle.files()
    to_storage = {token for _, path, _, token in hub.requests if path.startswith("/cdn")}
    assert to_storage == {None}


def test_a_hub_without_ranges(hub, cache, fast_dir, monkeypatch):
    monkeypatch.setattr("loopback_hub._Handler._range", lambda self: None)
    with pytest.raises(ResourceError, match=r"does not give parts of this file.*without --drop-sources"):
        stream(BOTH, fast_dir / "x.krasis")


def test_a_plan_leaves_nothing(hub, cache, fast_dir):
    plan = stream(BOTH, fast_dir / "x.krasis", plan_only=True)
    assert plan.source_bytes > 0
    assert not list(fast_dir.iterdir())


def test_a_plan_never_downloads_the_model(hub, cache, fast_dir):
    reporter = Reporter(0, StringIO())
    size = sum(path.stat().st_size for path in hub.models["org/tiny"].folder.iterdir())
    named, out = parse_inputs(["org/tiny"]), fast_dir / "x.krasis"
    with opened_inputs(named, out, reporter, restart=False, plan_only=True, drop=False) as (paths, more):
        plan = dry_run(prepare(paths, out, ConvertSettings(), reporter, more))
    assert plan.source_bytes > 0.9 * size - 50_000
    assert hub.sent < 0.2 * size
    assert not list(fast_dir.iterdir())


def test_whoever_waits_is_told_that_it_is_over(hub, cache, fast_dir):
    """A thread that reads ahead must not keep an interrupted conversion from ending."""

    class Never:
        def read(self, begin, end):
            over.wait(PATIENCE_S)
            yield b""

    over, told = threading.Event(), []
    store = SourceStore(fast_dir / "s")
    store.begin({"models": 1})
    path = store.add("a", 100).path
    fetch = fetcher.Fetcher(store, {path: Never()}, num_threads=1)
    sources = streamed.StreamedSources(store, fetch, {}, {})

    def wait():
        with pytest.raises(ResourceError, match="has ended"):
            sources.need(path, 0, 100)
        told.append(True)

    reader = threading.Thread(target=wait)
    reader.start()
    with pytest.raises(KeyboardInterrupt), sources.used():
        raise KeyboardInterrupt
    reader.join(PATIENCE_S)
    assert told
    over.set()
    sources.close()


def test_files_of_the_user_are_never_removed(hub, cache, fast_dir, hf_dir, bundle):
    with pytest.raises(UsageError, match="the user's own files are never removed"):
        stream([str(hf_dir)], fast_dir / "x.krasis")
    before = tree_digests(hf_dir)
    stream([str(hf_dir), BOTH[1]], fast_dir / "x.krasis")
    assert tree_digests(hf_dir) == before
    assert tree_digests(fast_dir / "x.krasis") == bundle.files()


def test_what_cannot_be_done_leaves_nothing(hub, cache, fast_dir, bundle):
    with pytest.raises(UsageError, match="does not divide"):
        stream(BOTH, fast_dir / "x.krasis", gpu_group=96)
    assert not list(fast_dir.iterdir())
    (fast_dir / "x.krasis").mkdir()
    with pytest.raises(UsageError, match="the output exists already"):
        stream(BOTH, fast_dir / "x.krasis")
    assert not list((fast_dir / "x.krasis").iterdir())


def test_two_at_once(hub, cache, fast_dir):
    store = SourceStore(sources_path(fast_dir / "x.krasis"))
    with pytest.raises(ResourceError, match="another conversion is writing here"):
        stream(BOTH, fast_dir / "x.krasis")
    store.close()


# ---- the store ---------------------------------------------------------------------------------------------


def test_what_the_log_does_not_know_of_is_freed(fast_dir):
    store = SourceStore(fast_dir / "s")
    store.begin({"models": 1})
    file = store.add("m/a", 1 << 20)
    os.pwrite(file.fd, b"x" * (1 << 19), 0)
    store.keep(file, 0, 1 << 18)
    store.close()
    with (fast_dir / "s" / "parts.jsonl").open("ab") as log:
        log.write(encode_line({"file": "m/a", "begin": 0, "end": 1 << 20, "is": "there"})[:-3])  # torn
    store = SourceStore(fast_dir / "s")
    store.begin({"models": 1})
    file = store.add("m/a", 1 << 20)
    assert list(file.present) == [(0, 1 << 18)]
    assert os.fstat(file.fd).st_blocks * 512 <= 1 << 18
    assert os.pread(file.fd, 1 << 20, 0) == b"x" * (1 << 18) + bytes((1 << 20) - (1 << 18))
    store.drop(file, 0, 1 << 18)
    assert os.fstat(file.fd).st_blocks == 0
    store.remove()
    store.close()
    assert not (fast_dir / "s").exists()


def test_other_sources_begin_anew(fast_dir):
    store = SourceStore(fast_dir / "s")
    store.begin({"models": 1})
    store.keep(store.add("a", 1 << 16), 0, 1 << 16)
    store.close()
    store = SourceStore(fast_dir / "s")
    store.begin({"models": 2})
    assert not store.add("a", 1 << 16).present
    store.close()


def test_a_folder_of_the_user_is_not_touched(fast_dir):
    (fast_dir / "s").mkdir()
    (fast_dir / "s" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="in the way of the sources"):
        SourceStore(fast_dir / "s")
    assert (fast_dir / "s" / "diary.txt").read_text() == "mine"
