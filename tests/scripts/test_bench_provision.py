"""Peers from an index package, without an index: what is downloaded, built once, and said when it fails."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import provision
from scripts.bench.cli import main
from scripts.bench.document import render
from scripts.bench.process import Outcome
from scripts.bench.record import Record, Run

SOURCES = "llama_cpp_python-0.3.36/vendor/llama.cpp/CMakeLists.txt"


class FakeTools:
    """pip and cmake. member: what the sdist holds; fails: a word of the command that fails."""

    def __init__(self, member: str = SOURCES, fails: str = "") -> None:
        self.member, self.fails = member, fails
        self.commands: list[list[str]] = []

    def run(self, arguments: Sequence[str], **_: Any) -> Outcome:
        command = [str(part) for part in arguments]
        self.commands.append(command)
        error = f"exit status 1: {self.fails} is not possible" if self.fails in command and self.fails else ""
        if not error and "download" in command:
            self._download(Path(command[command.index("-d") + 1]))
        if not error and "install" in command:
            (Path(command[command.index("--target") + 1]) / "kt_kernel").mkdir(parents=True)
        if not error and "--build" in command:
            binary = Path(command[command.index("--build") + 1]) / "bin" / "llama-bench"
            binary.parent.mkdir(parents=True)
            binary.write_text("a program")
        return Outcome(" ".join(command), "", error, 0.0, 0.0, 0.0)

    def _download(self, folder: Path) -> None:
        with tarfile.open(folder / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as archive:
            data = b"cmake_minimum_required(VERSION 3.14)"
            info = tarfile.TarInfo(self.member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTools]:
    def use(**options: str) -> FakeTools:
        fake = FakeTools(**options)
        monkeypatch.setattr(provision.process, "run", fake.run)
        monkeypatch.setattr(provision.shutil, "which", lambda name: f"/usr/bin/{name}")
        return fake

    return use


def test_llama_bench_is_built_once(tools: Callable[..., FakeTools], tmp_path: Path) -> None:
    fake = tools()
    found = provision.llama_bench("auto", tmp_path)
    assert found.path is not None
    assert found.path.read_text() == "a program"
    download, configure, build = fake.commands
    # ":all:" would have pip compile CMake itself, to prepare the package's metadata.
    assert ":all:" not in download
    assert download[download.index("--no-binary") + 1] == "llama-cpp-python"
    assert download[-1] == provision.LLAMA_PACKAGE
    assert configure[configure.index("-S") + 1].endswith("vendor/llama.cpp")
    assert "-DGGML_NATIVE=ON" in configure
    assert build[-2:] == ["llama-bench", "llama-quantize"]
    assert provision.llama_bench("auto", tmp_path) == found
    assert len(fake.commands) == 3
    assert provision.LLAMA_PACKAGE in found.recipe


def test_an_interrupted_build_goes_on_without_a_download(
    tools: Callable[..., FakeTools], tmp_path: Path
) -> None:
    tools(fails="--build")
    assert "could not be built" in provision.llama_bench("auto", tmp_path).missing
    fake = tools()
    assert provision.llama_bench("auto", tmp_path).path is not None
    assert not any("download" in command for command in fake.commands)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fails": "download"}, "download is not possible"),
        ({"fails": "-S"}, "-S is not possible"),
        ({"fails": "--build"}, "--build is not possible"),
        ({"member": "llama_cpp_python-0.3.36/README.md"}, "carries no vendor/llama.cpp"),
    ],
)
def test_why_there_is_no_llama_bench(
    tools: Callable[..., FakeTools], tmp_path: Path, options: dict[str, str], words: str
) -> None:
    tools(**options)
    found = provision.llama_bench("auto", tmp_path)
    assert found.path is None
    assert words in found.missing


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision.shutil, "which", lambda _: None)
    assert "cmake and ninja are needed" in provision.llama_bench("auto", tmp_path).missing


def test_kt_kernel_is_unpacked_once(tools: Callable[..., FakeTools], tmp_path: Path) -> None:
    fake = tools()
    found = provision.kt_kernel("auto", tmp_path)
    assert found.path is not None
    assert (found.path / "kt_kernel").is_dir()
    assert "--no-deps" in fake.commands[0]  # its dependencies would replace this environment's torch
    assert provision.kt_kernel("auto", tmp_path) == found
    assert len(fake.commands) == 1
    tools(fails="install")
    assert "install is not possible" in provision.kt_kernel("auto", tmp_path / "other").missing


def test_the_layer_stage_builds_no_llama_bench(
    tools: Callable[..., FakeTools], tmp_path: Path, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    fake = tools()
    monkeypatch.setattr("scripts.bench.facts.machine_facts", dict)
    result = CliRunner().invoke(main, ["run", "--stage", "layer", "--kt-kernel", "auto", *places])
    assert result.exit_code == 0, result.output
    assert [command[3] for command in fake.commands] == ["install"]
    assert "kt-kernel" in Record(tmp_path / "r.h5").facts("programs")


def test_every_variant_is_told_where_it_comes_from(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.h5")
    record.set_facts("programs", {"kt-kernel": "the wheel", "krasis": "this commit"})
    run = Run(stage="layer", model="m", case="8 bit", threads=1, subject="kt-kernel q8_0 (avx2)", round=0)
    record.add([run])
    assert "| kt-kernel q8_0 (avx2) | \u2013 | the wheel |" in render(record, record.runs(), {})


def test_llama_cpp_is_built_with_a_tile_configuration_that_is_whole(
    tools: Callable[..., FakeTools], tmp_path: Path
) -> None:
    """GCC 12's own tells the compiler of 8 of its 64 bytes."""
    fake = tools()
    found = provision.llama_bench("auto", tmp_path)
    configure = next(command for command in fake.commands if "-S" in command)
    header = next(Path(one.split()[-1]) for one in configure if one.startswith("-DCMAKE_CXX_FLAGS=-include "))
    assert "unsigned char(*)[64]" in header.read_text("utf-8")
    assert header.name in found.recipe
