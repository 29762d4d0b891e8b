"""``--verify`` tells damage from files that changed meanwhile and from files that the system did not show."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.formats.bundle import verify as bundle_verify
from krasis.formats.bundle.verify import verdict, verify_bundle
from krasis.runtime.cli.info_command import main


def largest(bundle: Path) -> Path:
    return max(bundle.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def replace_by_other(bundle: Path) -> None:
    victim, other = largest(bundle), bundle / ".new"
    other.write_bytes(victim.read_bytes()[:-100] + b"\xaa" * 100)
    other.replace(victim)


def replace_by_same(bundle: Path) -> None:
    shutil.copy2(largest(bundle), bundle / ".new")
    (bundle / ".new").replace(largest(bundle))


def append(bundle: Path) -> None:
    with largest(bundle).open("ab") as file:
        file.write(b"x" * 4096)


def cut(bundle: Path) -> None:
    os.truncate(largest(bundle), 5000)


def rewrite_and_hide_it(bundle: Path) -> None:
    """Bytes that were read already, with the old time stamp put back."""
    victim = bundle / "dense-000.safetensors"
    status = victim.stat()
    with victim.open("r+b") as file:
        file.seek(100)
        file.write(b"\xaa" * 50)
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(bundle: Path) -> None:
    largest(bundle).unlink()


def rewrite_an_asset(bundle: Path) -> None:
    with (bundle / "tokenizer.json.zst").open("r+b") as file:
        file.write(b"\x00" * 8)


def rewrite_the_manifest(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())


def exchange_the_folder(bundle: Path) -> None:
    other = bundle.with_name("other")
    shutil.copytree(bundle, other)
    bundle.rename(bundle.with_name("old"))
    other.rename(bundle)


def link_to_nowhere(bundle: Path) -> None:
    (bundle / "gpu-000.safetensors").unlink()
    (bundle / "gpu-000.safetensors").symlink_to("/nowhere")


CHANGES = [
    replace_by_other,
    replace_by_same,
    append,
    cut,
    rewrite_and_hide_it,
    remove,
    rewrite_an_asset,
    rewrite_the_manifest,
    exchange_the_folder,
    link_to_nowhere,
]


def once(action: Callable[[], None]) -> Callable[[int], None]:
    done: list[int] = []

    def report(num_bytes: int) -> None:
        if not done:
            done.append(num_bytes)
            action()

    return report


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_changes_meanwhile_is_neither_intact_nor_damaged(
    bundle: Path, change: Callable[[Path], None], num_threads: int
):
    problems = verify_bundle(bundle, once(lambda: change(bundle)), num_threads=num_threads)
    assert problems
    assert verdict(problems) == "changed", problems
    assert all(problem.kind == "changed" for problem in problems)
    assert all("check again" in problem.what for problem in problems)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_it_is_opened(
    bundle: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
):
    real = bundle_verify.Bundle.open

    def open_late(path: Path) -> bundle_verify.Bundle:
        change(bundle)
        return real(path)

    monkeypatch.setattr(bundle_verify.Bundle, "open", open_late)
    assert verdict(verify_bundle(bundle)) == "changed"


def test_damage_is_damage_although_another_file_changes(bundle: Path):
    with (bundle / "dense-000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    problems = verify_bundle(bundle, once(lambda: rewrite_an_asset(bundle)), num_threads=1)
    assert {problem.kind for problem in problems} == {"damaged", "changed"}
    assert verdict(problems) == "damaged"


def test_scratch_files_may_come_and_go(bundle: Path):
    (bundle / ".cache").write_text("x")

    def touch() -> None:
        (bundle / ".cache").unlink()
        (bundle / ".other").write_text("y")

    assert verify_bundle(bundle, once(touch)) == []


def test_files_written_just_before_are_looked_at_when_they_are_older(bundle: Path):
    """A second write within a tick of the file system's clock leaves the time stamp as it was."""
    asset = bundle / "tokenizer.json.zst"
    asset.write_bytes(asset.read_bytes())
    begin = time.time()
    assert verify_bundle(bundle) == []
    assert time.time() - begin >= 0.02


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ENFILE, errno.ENOMEM])
def test_what_cannot_be_opened_is_not_called_damaged(
    bundle: Path, code: int, monkeypatch: pytest.MonkeyPatch
):
    real = os.open

    def refuse(path: str | Path, *arguments: object, **options: object) -> int:
        if Path(path).name == "cpu-000.safetensors":
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    result = CliRunner().invoke(main, [str(bundle), "--verify", "--json"])
    assert result.exit_code == 6, result.output
    record = json.loads(result.stdout)["verify"]
    assert record["verdict"] == "unreadable"
    assert record["intact"] is False
    assert os.strerror(code) in record["problems"][0]


def test_a_failing_disk_is_not_called_damage(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = os.pread, []

    def fail(fd: int, num_bytes: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, num_bytes, offset)

    monkeypatch.setattr(os, "pread", fail)
    problems = verify_bundle(bundle, num_threads=1)
    assert verdict(problems) == "unreadable"
    assert "Input/output error" in problems[0].what


def test_a_folder_that_cannot_be_listed_is_not_called_intact(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", refuse)
    assert verdict(verify_bundle(bundle)) == "unreadable"


@pytest.mark.parametrize("limit", [5, 7])
def test_few_open_files_end_in_a_sentence(pristine: Path, limit: int):
    command = f'ulimit -n {limit}; exec "$0" -m krasis.runtime.cli.info_command "$1" --verify'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, str(pristine)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 6), done
    assert "Traceback" not in done.stderr
    assert (": intact, " in done.stdout) == (done.returncode == 0)
