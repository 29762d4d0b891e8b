"""A mapped file that is cut short ends a command with a sentence and an exit code, never with SIGBUS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.files.file_mapping import FileMapping, prefault
from krasis.formats.files.file_ops import io_errors

# Cuts a file at a given point of a command, then goes on with it.
CONVERT = """
import os, sys
from krasis.convert import cli, journal
append = journal.Journal.append
left = int(sys.argv.pop(1))
def cut(self, record):
    global left
    append(self, record)
    left -= 1
    if left == 0:
        os.truncate(sys.argv[1] + "/model.safetensors", 4096)
journal.Journal.append = cut
cli.main()
"""
RUN = """
import os, sys
from krasis.runtime.held_tokens import HeldTokens
from krasis.runtime.cli import run as cli
shard = sys.argv[1] + "/" + sys.argv.pop()
decode, calls = HeldTokens.decode, []
def cut(self, token):
    calls.append(token)
    if len(calls) == 3:
        os.truncate(shard, 4096)
    return decode(self, token)
HeldTokens.decode = cut
sys.argv[0] = "krasis-run"
cli.main()
"""
# What an embedding program gets: nothing unless it asks for it.
LIBRARY = """
import sys
from krasis.runtime import Engine
with Engine.open(sys.argv[1]) as engine:
    engine.prefill([1, 2, 3])
    caught = next(line for line in open("/proc/self/status") if line.startswith("SigCgt:")).split()[1]
    print(int(caught, 16) >> 6 & 1)
"""
FOREIGN = """
import faulthandler, mmap, os, sys
from krasis.formats.files import mapping_guard
faulthandler.enable()
mapping_guard.install("tool")
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(fd, 8192)
mapping = mmap.mmap(fd, 8192)
os.truncate(fd, 0)
mapping[5000]
"""


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("shard", "faulthandler"), [("cpu-000.safetensors", ""), ("dense-000.safetensors", "1")]
)
def test_a_shard_cut_while_it_is_used(chat_bundle_copy: Path, shard: str, faulthandler: str) -> None:
    arguments = (chat_bundle_copy, "--raw", "--prompt", "x", "--max-tokens", 30, "--temperature", 0, shard)
    done = python(RUN, *arguments, PYTHONFAULTHANDLER=faulthandler)
    assert done.returncode == 3, done
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"krasis-run: {chat_bundle_copy / shard}: the file was cut short"), (
        done.stderr
    )
    assert "Hint: " in lines[-1]
    assert "Fatal Python error" not in done.stderr


def test_a_name_does_not_drive_the_terminal(chat_bundle_copy: Path) -> None:
    hostile = chat_bundle_copy.with_name("\x1b]0;title\x07 \udcff\n")
    chat_bundle_copy.rename(hostile)
    shard = "cpu-000.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", RUN, hostile, "--raw", "--prompt", "x", "--max-tokens", "30", shard],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3, done
    assert b"\x1b" not in done.stderr
    assert (
        b"\\x1b]0;title\\x07 \\udcff\\n/cpu-000.safetensors: the file was cut" in done.stderr.splitlines()[-1]
    )


def test_a_source_cut_while_it_is_converted(checkpoint_copy: Path, tmp_path: Path) -> None:
    num_steps = 3
    source, out = checkpoint_copy / "model.safetensors", tmp_path / "out.krasis"
    whole, status = source.read_bytes(), source.stat()
    done = python(CONVERT, num_steps, checkpoint_copy, "-o", out, "--quiet")
    assert done.returncode == 3, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"krasis-convert: {source}: the file was cut short"), done.stderr
    assert "the same command goes on" in last
    assert not out.exists()
    # The very file is there again: what was finished is not done again.
    source.write_bytes(whole)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = python(CONVERT, 0, checkpoint_copy, "-o", out)
    assert again.returncode == 0, again
    assert f"{num_steps} of " in again.stderr + again.stdout
    fresh = tmp_path / "fresh.krasis"
    assert python(CONVERT, 0, checkpoint_copy, "-o", fresh).returncode == 0
    assert (out / "manifest.json").read_bytes() == (fresh / "manifest.json").read_bytes()


def test_a_source_replaced_by_another_is_not_continued(checkpoint_copy: Path, tmp_path: Path) -> None:
    source, out = checkpoint_copy / "model.safetensors", tmp_path / "out.krasis"
    whole = source.read_bytes()
    assert python(CONVERT, 1, checkpoint_copy, "-o", out, "--quiet").returncode == 3
    source.write_bytes(whole)
    again = python(CONVERT, 0, checkpoint_copy, "-o", out, "--quiet")
    assert again.returncode == 5, again
    assert "--restart" in again.stderr


def test_the_library_leaves_the_signal_to_the_program_around_it(chat_bundle: Path) -> None:
    assert python(LIBRARY, chat_bundle, PYTHONFAULTHANDLER="").stdout.strip() == "0"


def test_faults_of_others_go_where_they_went(tmp_path: Path) -> None:
    done = python(FOREIGN, tmp_path / "foreign")
    assert done.returncode == -signal.SIGBUS, done
    assert "Fatal Python error: Bus error" in done.stderr


def test_the_system_meets_the_cut_before_we_do(tmp_path: Path) -> None:
    """Writing from a mapping, and reading ahead of it, fail without a signal."""
    path = tmp_path / "cut"
    path.write_bytes(bytes(3 * 4096))
    with path.open("rb") as file, (tmp_path / "out").open("wb") as out:
        mapping = FileMapping(file.fileno(), 3 * 4096)
        os.truncate(path, 0)
        with pytest.raises(ResourceError, match="cut short"):
            prefault(mapping.address, 4096)
        with pytest.raises(FormatError, match="cut short"), io_errors("writing", "out"):
            os.write(out.fileno(), mapping.view().data)


def test_a_shard_that_is_written_to_is_told(chat_bundle_copy: Path) -> None:
    """The mapping shows the new bytes: neither an error nor a signal says so."""
    code = RUN.replace("os.truncate(shard, 4096)", "os.utime(shard)")
    arguments = (chat_bundle_copy, "--raw", "--prompt", "x", "--max-tokens", 5, "cpu-000.safetensors")
    done = python(code, *arguments)
    assert done.returncode == 0, done
    assert f"{chat_bundle_copy}/cpu-000.safetensors: written to while the model ran" in done.stderr
    assert "written to" not in python(code.replace("os.utime(shard)", "pass"), *arguments).stderr


def test_a_rank_says_which_it_is(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(3 * 4096))
    code = """
import os, sys
from krasis.formats.files.file_mapping import FileMapping
from krasis.runtime.distributed import worker
from pathlib import Path
def serve(path, settings, place):
    with path.open("rb") as file:
        mapping = FileMapping(file.fileno(), 3 * 4096, path)
    os.truncate(path, 0)
    return mapping.view().sum()
worker.serve_rank = serve
place = type("Place", (), {"rank": 2})()
worker.run_rank(Path(sys.argv[1]), None, place)
"""
    done = python(code, path)
    assert done.returncode == 3, done
    assert done.stderr.startswith(f"krasis-run: rank 2: {path}: the file was cut short")
