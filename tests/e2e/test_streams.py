"""The commands as services and scripts start them: streams closed, full, unread, of any encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "run": "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')",
    "info": "from krasis.runtime.cli.info_command import main; main(prog_name='krasis-info')",
    "convert": "from krasis.convert.cli import main; main(prog_name='krasis-convert')",
    "importance": "from krasis.runtime.cli.importance_command import main; main(prog_name='importance')",
}
ASK = ["--prompt", "hello", "--raw", "--max-tokens", "12", "--temperature", "0", "--threads", "2"]


def shell(
    line: str, *arguments: str | Path, program: str = "run", stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which $@ is the command with its arguments."""
    command = [sys.executable, "-c", PROGRAMS[program], *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", line, "bash", *command],
        input=stdin,
        check=False,
        capture_output=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def answer(chat_bundle: Path) -> bytes:
    done = shell('"$@"', chat_bundle, *ASK)
    assert done.returncode == 0, done.stderr
    return done.stdout


def only_sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr."""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_no_stdin_and_no_prompt(chat_bundle: Path) -> None:
    for line, why in (('"$@" <&-', "stdin is closed"), ('"$@" </dev/null', "stdin is empty")):
        done = shell(line, chat_bundle)
        assert done.returncode == 2
        assert f"there is no prompt: {why}" in only_sentence(done)
    done = shell('"$@" <&-', chat_bundle, "--file", "-")
    assert (done.returncode, "stdin is closed" in only_sentence(done)) == (2, True)


@pytest.mark.parametrize("line", ['"$@" <&-', '"$@" 2>&-', '"$@" 2>/dev/full', '"$@" <&- 2>&-'])
def test_the_answer_comes_without_stdin_or_stderr(chat_bundle: Path, answer: bytes, line: str) -> None:
    done = shell(line, chat_bundle, *ASK)
    assert (done.returncode, done.stdout) == (0, answer)


def test_notes_nobody_reads_do_not_end_the_work(chat_bundle: Path, answer: bytes, tmp_path: Path) -> None:
    done = shell(f'"$@" 2>&1 >{tmp_path / "out"} | true; exit ${{PIPESTATUS[0]}}', chat_bundle, *ASK, "-vv")
    assert (done.returncode, (tmp_path / "out").read_bytes()) == (0, answer)


def test_closed_stdout_is_told_before_the_work(chat_bundle: Path, tmp_path: Path) -> None:
    done = shell('"$@" >&-', chat_bundle, *ASK)
    assert done.returncode == 2
    assert "stdout is closed" in only_sentence(done)
    done = shell('"$@" >&-', chat_bundle, program="info")
    assert (done.returncode, "stdout is closed" in only_sentence(done)) == (2, True)
    assert shell('"$@" >&- 2>&-', chat_bundle, "--verify", program="info").returncode == 0


@pytest.mark.parametrize("flags", [[], ["--json"], ["--no-stream"]])
def test_a_full_disk_is_told_and_the_work_is_saved(
    chat_bundle: Path, tmp_path: Path, flags: list[str]
) -> None:
    done = shell('"$@" >/dev/full', chat_bundle, *ASK, *flags, "--save-kv", tmp_path / "a.kv")
    assert done.returncode == 6
    assert b"krasis-run: stdout: the output cannot be written (got No space left on device)" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert (tmp_path / "a.kv").stat().st_size > 4096


def test_a_reader_that_leaves(chat_bundle: Path) -> None:
    endless = [*ASK, "--max-tokens", "400"]
    done = shell('"$@" | head -c 3 >&2; exit ${PIPESTATUS[0]}', chat_bundle, *endless)
    assert done.returncode == 141
    assert "a pipe without a reader" in done.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_help_and_version_onto_a_full_disk(program: str) -> None:
    for flag, unbuffered in (("--help", ""), ("--help", "1"), ("--version", "")):
        done = shell('"$@" >/dev/full', flag, program=program, PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 6
        assert "No space left on device" in only_sentence(done)


@pytest.mark.parametrize("program", ["run", "info"])
def test_reports_onto_a_full_disk(chat_bundle: Path, program: str) -> None:
    done = shell('"$@" >/dev/full', chat_bundle, *(ASK if program == "run" else ["--json"]), program=program)
    assert done.returncode == 6
    assert "No space left on device" in only_sentence(done)


def test_closed_streams_are_not_taken_by_other_files(chat_bundle: Path, tmp_path: Path) -> None:
    """What is written to a closed stderr must not end up in a file that happened to get its number."""
    done = shell('"$@" <&- 2>&-', chat_bundle, *ASK, "-vv", "--save-kv", tmp_path / "a.kv")
    assert done.returncode == 0
    again = shell('"$@"', chat_bundle, *ASK, "--load-kv", tmp_path / "a.kv")
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_encodings_that_lack_a_character(chat_bundle: Path) -> None:
    # The answer of a random model: bytes that are no UTF-8 have become U+FFFD.
    expected = shell('"$@"', chat_bundle, *ASK).stdout.decode()
    assert any(ord(character) > 0xFF for character in expected)
    for encoding in ("ascii", "latin-1", "cp1252:strict", "utf-8"):
        done = shell('"$@"', chat_bundle, *ASK, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        name = encoding.partition(":")[0]
        assert done.stdout == expected.encode(name, "replace")
    done = shell('"$@"', chat_bundle, *ASK, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["text"] == expected.removesuffix("\n")


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_all_commands_have_a_version(program: str) -> None:
    from importlib.metadata import version

    import krasis.runtime

    done = shell('"$@"', "--version", program=program)
    name = {"importance": "importance"}.get(program, f"krasis-{program}")
    assert (done.returncode, done.stdout.decode()) == (0, f"{name}, version {version('krasis-bundle')}\n")
    assert krasis.runtime.__version__ == version("krasis-bundle")


def test_a_document_and_a_question(chat_bundle: Path, tmp_path: Path) -> None:
    """The document first, so that questions about it share its prefix."""

    def count(line: str, *arguments: str | Path, stdin: bytes = b"") -> tuple[int, str]:
        flags = ["--raw", "--max-tokens", "2", "--temperature", "0", "--ctx", "2048", "--json"]
        done = shell(line, chat_bundle, *flags, *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        return report["num_prompt_tokens"], report["text"]

    document = "".join(f"{number}\n" for number in range(100))
    (tmp_path / "document").write_text(document)
    (tmp_path / "question").write_text("Summarise:")
    joined = count('"$@" </dev/null', "--prompt", document.rstrip("\n") + "\n\nSummarise:")
    alone = count('"$@" </dev/null', "--prompt", "Summarise:")
    assert joined[0] > 100 > alone[0]
    assert count('"$@"', "--prompt", "Summarise:", stdin=document.encode()) == joined
    assert count(f'"$@" <{tmp_path / "document"}', "--prompt", "Summarise:") == joined
    assert count('"$@" </dev/null', "--prompt", "Summarise:", "--file", tmp_path / "document") == joined
    assert count('"$@"', "--file", tmp_path / "question", stdin=document.encode()) == joined
    assert count('"$@"', "--prompt", "Summarise:", "--file", "-", stdin=document.encode()) == joined
    for line in ('"$@" <&-', '"$@"', '"$@" </dev/zero'):
        assert count(line, "--prompt", "Summarise:") == alone


def test_a_silent_pipe_is_told_of(chat_bundle: Path, answer: bytes) -> None:
    command = [sys.executable, "-c", PROGRAMS["run"], str(chat_bundle), *ASK]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stderr is not None
        assert b"waiting for the text on stdin, which goes before the prompt" in process.stderr.readline()
        stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, answer)


def test_a_bad_document_is_refused(chat_bundle: Path) -> None:
    done = shell('"$@"', chat_bundle, *ASK, stdin=b"caf\xe9")
    assert (done.returncode, "not UTF-8" in only_sentence(done)) == (2, True)
