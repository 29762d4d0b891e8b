"""Every system call of a conversion fails once, or is the last before a crash: nothing half-made opens."""

import contextlib
import errno
import itertools
import shutil
from pathlib import Path

import pytest
from format_builders import SPECS, write_bundle, write_partial

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.shard_plan import plan_shards
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.bundle.writer import BundleWriter
from krasis.formats.errors import FormatError, KrasisError, MismatchError, ResourceError
from krasis.formats.files.file_ops import FileOps

CALLS = [name for name in vars(FileOps) if not name.startswith("_")]


class Killed(BaseException):
    """The process ends here: no handler may run on."""


class Failing(FileOps):
    """Fails at the n-th call, once (an error) or for ever after (a kill: every later call fails too)."""

    def __init__(self, fail_at: int | None, code: int | None) -> None:
        self.fail_at, self.code = fail_at, code
        self.count = 0
        self.calls: list[str] = []
        self.can_exchange = True


def _wrapped(name):
    original = getattr(FileOps, name)

    def call(self, *arguments):
        self.calls.append(name)
        self.count += 1
        if self.fail_at is not None:
            if self.code is None and self.count > self.fail_at and name != "close":
                raise Killed
            if self.code is not None and self.count == self.fail_at + 1:
                if name == "close":
                    original(self, *arguments)
                raise OSError(self.code, "injected")
        if name == "rename_exchange" and not self.can_exchange:
            return False
        return original(self, *arguments)

    return call


for _name in CALLS:
    setattr(Failing, _name, _wrapped(_name))


def convert(folder: Path, io: FileOps, replace: bool) -> None:
    writer, manifest = write_partial(folder / "m.partial", io)
    with writer:
        writer.finish(manifest, folder / "m", replace=replace)


def count_calls(folder: Path) -> int:
    probe = Failing(None, None)
    convert(folder, probe, replace=False)
    assert {"open", "mkdir", "fallocate", "pwrite", "fsync", "rename", "close"} <= set(probe.calls)
    return probe.count


def is_complete(path: Path) -> bool:
    try:
        Bundle.open(path).close()
    except FormatError:
        return False
    assert verify_bundle(path) == []
    return True


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, None], ids=["ENOSPC", "EIO", "kill"])
def test_failure_at_every_call(tmp_path, code):
    probe = tmp_path / "probe"
    probe.mkdir()
    outcomes = set()
    for fail_at in range(count_calls(probe)):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        attempt(folder, lambda folder=folder, n=fail_at: convert(folder, Failing(n, code), replace=False))
        outcomes.add(check_outcome(folder, replace=False))
        shutil.rmtree(folder)
    assert outcomes == {"absent", "complete"}


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, None], ids=["EIO", "kill"])
def test_failure_at_every_call_of_a_replacement(tmp_path, code, can_exchange):
    """Only finish matters here: what comes before does not know of the older bundle."""
    (tmp_path / "template").mkdir()
    write_bundle(tmp_path / "template" / "m")
    writer, manifest = write_partial(tmp_path / "template" / "m.partial")
    writer.close()

    def finish(folder: Path, io: Failing) -> None:
        with BundleWriter(folder / "m.partial", writer.plan, io=io) as again:
            again.reopen()
            again.finish(manifest, folder / "m", replace=True)

    for fail_at in itertools.count():
        folder = tmp_path / str(fail_at)
        shutil.copytree(tmp_path / "template", folder)
        io = Failing(fail_at, code)
        io.can_exchange = can_exchange
        attempt(folder, lambda folder=folder, io=io: finish(folder, io))
        if can_exchange:
            assert check_outcome(folder, replace=True)
        elif not is_complete(folder / "m"):
            # Between two renames: the old bundle is intact beside its place, the new one can be finished.
            assert code is None
            assert is_complete(folder / "m.replaced")
            assert (folder / "m.partial").is_dir()
        shutil.rmtree(folder)
        if io.count <= fail_at:
            break  # it was over before
    assert fail_at > 20


def attempt(folder: Path, action) -> None:
    """Runs it; whatever fails must be our error, with the place and the reason."""
    with contextlib.suppress(Killed):
        failure = None
        try:
            action()
        except (KrasisError, OSError) as error:
            failure = error
        if failure is not None:
            assert isinstance(failure, ResourceError), failure
            assert "injected" in str(failure)
            assert str(folder) in str(failure)


def check_outcome(folder: Path, replace: bool) -> str:
    """Whatever is called m is complete; whatever is not complete does not open."""
    if replace:
        assert is_complete(folder / "m")
        outcome = "old or new"
    else:
        outcome = "complete" if (folder / "m").exists() else "absent"
        assert is_complete(folder / "m") == (outcome == "complete")
    assert not is_complete(folder / "m.partial")
    return outcome


def test_an_interrupted_conversion_goes_on_where_its_shards_are_whole(tmp_path):
    """After a kill at any call, either all shards are there and reopen accepts them, or it refuses."""
    probe = tmp_path / "probe"
    probe.mkdir()
    reopened = 0
    for fail_at in range(count_calls(probe)):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        with contextlib.suppress(Killed):
            convert(folder, Failing(fail_at, None), replace=False)
        if (folder / "m").exists() or not (folder / "m.partial").exists():
            continue
        with BundleWriter(folder / "m.partial", plan_shards(SPECS)) as writer:
            try:
                writer.reopen()
            except MismatchError:
                continue
            reopened += 1
    assert reopened > 10


def test_a_full_disk_is_met_before_any_data_is_written(tmp_path):
    class FullDisk(FileOps):
        def fallocate(self, fd, num_bytes):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"reserving [0-9]+ bytes.*No space left.*free some disk space"):
        write_partial(tmp_path / "m.partial", FullDisk())


def test_short_writes_are_continued(tmp_path):
    class Sluggish(FileOps):
        def pwrite(self, fd, data, offset):
            return super().pwrite(fd, bytes(data[: max(1, len(data) // 2)]), offset)

    write_bundle(tmp_path / "slow", Sluggish())
    write_bundle(tmp_path / "fast")
    for path in (tmp_path / "fast").iterdir():
        assert path.read_bytes() == (tmp_path / "slow" / path.name).read_bytes()


def test_a_file_system_without_fallocate(tmp_path, monkeypatch, caplog):
    import krasis.formats.files.file_ops as module

    class Libc:
        class Call:
            argtypes = None

            def __call__(self, *_):
                import ctypes

                ctypes.set_errno(errno.EOPNOTSUPP)
                return -1

        fallocate = Call()
        renameat2 = None

    monkeypatch.setattr(module, "_libc", Libc())
    bundle = write_bundle(tmp_path / "m")
    assert verify_bundle(bundle) == []
    assert "cannot reserve space" in caplog.text
