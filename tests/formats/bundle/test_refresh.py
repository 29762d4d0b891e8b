"""Text files of a finished bundle are replaced whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from format_builders import write_bundle

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.refresh import REFRESH_SUFFIX, replace_assets
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.errors import FormatError, ResourceError, UsageError
from krasis.formats.files.file_ops import FileOps

NEW = {"tokenizer.json": b'{"new": 1}', "chat_template.jinja": b"{{ messages }}"}


class Killed(BaseException):
    """The process ends here."""


class Failing(FileOps):
    """Fails at one call (code), or at it and every later one (a kill)."""

    def __init__(self, fail_at: int | None = None, code: int | None = None) -> None:
        self.fail_at, self.code, self.calls = fail_at, code, []


def _wrapped(name):
    original = getattr(FileOps, name)

    def call(self, *arguments):
        self.calls.append(name)
        if self.fail_at is not None:
            late = len(self.calls) - 1 - self.fail_at
            if self.code is None and late >= 0 and name != "close":
                raise Killed
            if self.code is not None and late == 0:
                if name == "close":
                    original(self, *arguments)
                raise OSError(self.code, "injected")
        return original(self, *arguments)

    return call


for _name in [name for name in vars(FileOps) if not name.startswith("_")]:
    setattr(Failing, _name, _wrapped(_name))


def texts(path: Path) -> dict[str, bytes]:
    with Bundle.open(path) as bundle:
        return {asset.name: bundle.asset(asset.name) for asset in bundle.manifest.assets}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "m.krasis")


def test_replaces_adds_and_removes(bundle: Path) -> None:
    before = texts(bundle)
    with Bundle.open(bundle) as opened:
        manifest = opened.manifest
    inodes = {file.name: (bundle / file.name).stat().st_ino for file in manifest.files}
    replace_assets(bundle, NEW)
    assert texts(bundle) == before | NEW
    assert verify_bundle(bundle) == []
    with Bundle.open(bundle) as opened:
        assert opened.manifest.blobs == manifest.blobs
        assert opened.manifest.files == manifest.files
        assert opened.manifest.sources == manifest.sources
    assert inodes == {file.name: (bundle / file.name).stat().st_ino for file in manifest.files}
    replace_assets(bundle, {}, removed=set(NEW))
    assert texts(bundle) == {name: data for name, data in before.items() if name not in NEW}
    assert verify_bundle(bundle) == []
    assert [path.name for path in bundle.parent.iterdir()] == ["m.krasis"]


def test_a_link_to_a_bundle_stays_a_link(bundle: Path) -> None:
    link = bundle.with_name("latest")
    link.symlink_to(bundle)
    replace_assets(link, NEW)
    assert link.is_symlink()
    assert texts(bundle)["tokenizer.json"] == NEW["tokenizer.json"]


def test_killed_at_any_call_the_old_or_the_new_bundle_opens(bundle: Path) -> None:
    probe = Failing()
    before = texts(bundle)
    spare = bundle.with_name("spare.krasis")
    shutil.copytree(bundle, spare)
    replace_assets(spare, NEW, io=probe)
    assert {"mkdir", "link", "pwrite", "fsync", "rename", "rename_exchange"} <= set(probe.calls)
    seen = set()
    last = max(at for at, name in enumerate(probe.calls) if name != "close")
    for at in range(last + 1):
        with pytest.raises(Killed):
            replace_assets(bundle, NEW, io=Failing(at))
        now = texts(bundle)
        assert now in (before, before | NEW)
        seen.add(now == before)
        if now != before or at % 16 == 0:
            # What was left behind is no hindrance.
            replace_assets(bundle, before, removed=set(NEW) - set(before))
            replace_assets(bundle, NEW)
            assert verify_bundle(bundle) == []
            replace_assets(bundle, before, removed=set(NEW) - set(before))
            assert [path.name for path in bundle.parent.iterdir() if "refresh" in path.name] == []
    assert seen == {True, False}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_is_told_and_leaves_a_whole_bundle(bundle: Path, code: int) -> None:
    probe = Failing()
    before = texts(bundle)
    spare = bundle.with_name("spare.krasis")
    shutil.copytree(bundle, spare)
    replace_assets(spare, NEW, io=probe)
    for at in range(0, len(probe.calls), 4):
        with pytest.raises(ResourceError):
            replace_assets(bundle, NEW, io=Failing(at, code))
        assert texts(bundle) in (before, before | NEW)
        if texts(bundle) != before:
            replace_assets(bundle, before, removed=set(NEW) - set(before))
    assert verify_bundle(bundle) == []


def test_a_file_system_without_hard_links_is_told(bundle: Path) -> None:
    class NoLinks(FileOps):
        def link(self, source: object, target: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    before = texts(bundle)
    with pytest.raises(ResourceError, match="hard links"):
        replace_assets(bundle, NEW, io=NoLinks())
    assert texts(bundle) == before


def test_what_is_no_bundle_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        replace_assets(tmp_path / "nowhere", NEW)
    (bundle / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="other things"):
        replace_assets(bundle, NEW)
    assert (bundle / "mine.txt").read_text() == "keep me"
    (bundle / "mine.txt").unlink()
    other = bundle.with_name(bundle.name + REFRESH_SUFFIX)
    other.mkdir()
    (other / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="other things"):
        replace_assets(bundle, NEW)
    assert (other / "mine.txt").read_text() == "keep me"
    assert verify_bundle(bundle) == []


def test_two_at_once(bundle: Path) -> None:
    fd = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process"):
            replace_assets(bundle, NEW)
    finally:
        os.close(fd)
