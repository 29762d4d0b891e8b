"""The stage end to end at tiny sizes: what is run, what is left for the next call, what the document says."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from scripts.bench import kt_floor_runner
from scripts.bench.cli import main
from scripts.bench.document import write_document
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.reference import files, kt_floor, section, work
from scripts.bench.reference.files import Kind
from scripts.bench.reference.rows import WHOLE, Sizes
from scripts.bench.reference.watch import GIB
from scripts.bench.reference.work import Request, Stage
from scripts.models import make_random_gguf
from scripts.models.make_random_bundle import BundleRequest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

KIND = Kind("tiny")
MODEL = "tiny, 2 layers"

LLAMA_BENCH = """\
import json, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
if {fails}:
    sys.exit("error: unknown model architecture")
prompt, generate = map(int, sys.argv[sys.argv.index("-pg") + 1].split(","))
common = {{"build_commit": "abc", "build_number": 7, "n_prompt": prompt}}
print("loading", file=sys.stderr)
print(json.dumps([{{**common, "n_gen": 0, "samples_ns": [prompt * 10**6]}},
                  {{**common, "n_gen": generate, "samples_ns": [prompt * 10**6 + generate * 10**8]}}]))
"""
KT_RUNNER = """\
import json, sys
import kt_kernel
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
cases = {f"layer, {count} tokens": [0.001 * int(count)] * 3 for count in given["--tokens"].split(",")}
shared = {case: 2 for case in cases}
print(json.dumps({"seconds": cases, "calls_a_wait": shared, "version": kt_kernel.VERSION}))
"""


class Counted:
    """A deadline that allows so many things."""

    def __init__(self, count: float = float("inf")) -> None:
        self.left = count

    def allows(self, seconds: float) -> bool:
        assert seconds >= 0
        self.left -= 1
        return self.left >= 0


class Bench:
    """A stage of fake peers and the real Krasis, below a folder."""

    def __init__(self, folder: Path, *, llama_fails: bool = False) -> None:
        self.folder, self.log = folder, folder / "llama.log"
        self.record = Record(folder / "r.h5")
        self.said: list[str] = []
        self.llama = folder / "llama-bench"
        program = LLAMA_BENCH.format(log=str(self.log), fails=llama_fails)
        self.llama.write_text(f"#!{sys.executable}\n{program}")
        self.llama.chmod(0o755)
        (folder / "kt").mkdir()
        (folder / "kt" / "kt_kernel.py").write_text("VERSION = '0.0.1 of a test'\n")
        (folder / "kt_runner.py").write_text(KT_RUNNER)
        self.sizes = Sizes(prompt=24, generate=3, cap_bytes=GIB, threads=1)

    def run(self, deadline: Counted, *, gpus: tuple[int, ...] = (), rounds: int = 1, **chosen: Any) -> bool:
        request = Request(KIND, self.sizes, gpus, rounds, GIB, 2, 120.0, self.folder / "w", **chosen)
        llama, kt = Found(self.llama, recipe="a fake"), Found(self.folder / "kt")
        ik = Found(None, "not run: no --ik-llama-bench was given")
        stage = Stage(self.record, request, lambda: llama, ik, lambda: kt, deadline, self.said.append)  # type: ignore[arg-type]
        assert stage.layers == {"whole": 2, "both": 2}
        return stage.run()

    def runs(self, **wanted: Any) -> list[Run]:
        return [
            run
            for run in self.record.runs("reference")
            if all(getattr(run, name) == value for name, value in wanted.items())
        ]

    @property
    def unreached(self) -> str:
        return str(self.record.facts("gaps")["Not reached"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pools that are drawn at once, a fake runner of kt-kernel, and nothing is mounted."""

    def request(self: Kind, num_layers: int) -> BundleRequest:
        return BundleRequest(self.with_layers(num_layers), cpu_format="i4", pool_bytes=1 << 18)

    monkeypatch.setattr(Kind, "request", request)
    monkeypatch.setattr(make_random_gguf, "POOL_BYTES", 1 << 18)
    refused = SimpleNamespace(returncode=32, stderr="mount: permission denied\n")
    monkeypatch.setattr(files, "subprocess", SimpleNamespace(run=lambda *_, **__: refused))
    monkeypatch.setattr(kt_floor, "RUNNER", [str(tmp_path / "kt_runner.py")])


def test_every_row_runs_once_over_several_calls(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert not bench.run(Counted(0))
    assert bench.runs() == []
    assert bench.unreached == (
        "krasis, CPU alone; llama.cpp, CPU alone; kt-kernel rawint4; kt-kernel amxint4"
    )
    assert "is no tmpfs of huge pages (mount: permission denied)" in bench.said[0]
    made = files.bundle(KIND, 2, tmp_path / "w" / "memory") / "manifest.json"
    before = made.stat().st_mtime_ns
    assert not bench.run(Counted(2))  # Krasis, and one format of kt-kernel
    assert {run.subject for run in bench.runs()} == {"krasis, CPU alone", "kt-kernel rawint4"}
    assert bench.unreached == "llama.cpp, CPU alone; kt-kernel amxint4"
    assert bench.run(Counted())
    assert made.stat().st_mtime_ns == before  # used again
    assert bench.unreached == "nothing"
    assert bench.run(Counted(0))  # nothing is left
    lines = bench.log.read_text().splitlines()
    assert len(lines) == 1
    assert "-pg 24,3 -r 1 -o json" in lines[0]
    for subject in ("krasis, CPU alone", "llama.cpp, CPU alone"):
        for case in ("pp24", "tg3@24"):
            (run,) = bench.runs(model=MODEL, subject=subject, case=case)
            assert run.error == ""
            assert run.metrics["tokens_per_s"][0] > 0
    (decode,) = bench.runs(subject="llama.cpp, CPU alone", case="tg3@24")
    assert decode.metrics["tokens_per_s"][0] == pytest.approx(10)
    (one,) = bench.runs(subject="kt-kernel amxint4", case="layer, 1 tokens")
    assert (one.metrics["calls_a_wait"], one.version) == ((2.0,), "0.0.1 of a test")
    the_document_says_it(bench)


def test_one_depth_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(Counted(1), depths=(WHOLE,))
    assert {run.subject for run in bench.runs()} == {"krasis, CPU alone"}
    assert not bench.log.exists()


def test_what_was_not_given_is_forgotten_when_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def noted(subject: str, error: str) -> Run:
        return Run(
            stage="reference", model=MODEL, case="pp24", threads=1, subject=subject, round=0, error=error
        )

    there, absent = "llama.cpp, CPU alone", "ik_llama.cpp, 1 GPU, best flags"
    bench.record.add([noted(there, "not run: no --llama-bench was given"), noted(absent, "not run: no")])
    bench.run(Counted(0))
    assert {run.subject for run in bench.runs()} == {absent}
    bench.record.add([noted(there, "out of memory")])  # a failure is remembered
    bench.run(Counted(0))
    assert {run.subject for run in bench.runs()} == {absent, there}


def the_document_says_it(bench: Bench) -> None:
    out = bench.folder / "docs" / "B.md"
    write_document(bench.record, out, None)
    text = out.read_text()
    (ours,) = bench.runs(model=MODEL, subject="krasis, CPU alone", case="pp24")
    row = next(line for line in text.splitlines() if line.startswith("| krasis, CPU alone |"))
    assert row.split(" | ")[1:3] == ["24", f"{ours.metrics['tokens_per_s'][0]:.0f}"]
    assert "| llama.cpp, CPU alone | 24 | 1000 | 10.0 | 1 |" in text
    assert "| kt-kernel amxint4 (0.0.1 of a test) | layer, 1 tokens | 1.00 ms | 0.004 s |" in text
    assert text.count(f"### {MODEL}") == 1  # the same depth by itself and beside the peers
    assert "Not reached: nothing" in text
    assert "3 GPUs of 1 GiB: the machine had" in text
    assert str(bench.folder) not in text


def test_a_program_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, llama_fails=True)
    only_llama(bench.record)
    assert bench.run(Counted())
    assert bench.run(Counted())
    assert len(bench.log.read_text().splitlines()) == 1
    runs = bench.runs(subject="llama.cpp, CPU alone")
    assert {run.error for run in runs} == {"exit status 1: error: unknown model architecture"}
    assert [run.case for run in runs] == ["pp24", "tg3@24"]
    write_document(bench.record, tmp_path / "B.md", None)
    assert "unknown model architecture" in (tmp_path / "B.md").read_text()


def only_llama(record: Record) -> None:
    """The rest as if an earlier call had run it."""
    common: dict[str, Any] = {"stage": "reference", "threads": 1, "round": 0, "model": MODEL}
    rate = {"tokens_per_s": (5.0,)}
    record.add([Run(subject="krasis, CPU alone", case="pp24", metrics=rate, **common)])
    common["model"] = "tiny, one layer"
    record.add(
        Run(subject=f"kt-kernel {kind}", case="layer", error="not run", **common) for kind in kt_floor.FORMATS
    )


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, places: list[str]) -> None:
    options = ["--stage", "reference", "--shape", "tiny", "--layers", "2", "--memory-gib", "1", "--gpus", "0"]
    options += ["--llama-bench", "off", "--kt-kernel", "off", "--reference-prompt", "24", *places]
    first = CliRunner().invoke(main, ["run", *options, "--budget-s", "0.001"])
    assert first.exit_code == 0, first.output
    assert "layers: {'whole': 2, 'both': 2}" in first.output
    assert "time is up: run the same command to go on" in first.output
    only_llama(Record(tmp_path / "r.h5"))
    second = CliRunner().invoke(main, ["run", *options])
    assert second.exit_code == 0, second.output
    assert "all chosen stages are complete" in second.output
    record = Record(tmp_path / "r.h5")
    (run,) = (run for run in record.runs() if (run.subject, run.case) == ("llama.cpp, CPU alone", "pp24"))
    assert "not run" in run.error
    assert record.facts("reference")["prompt"] == 24
    assert "| llama.cpp, CPU alone | 24 | not run" in (tmp_path / "B.md").read_text()
    refused = CliRunner().invoke(main, ["run", "--stage", "reference,decode", *places])
    assert refused.exit_code == 2


def test_gpus_that_are_not_there_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "gpu_names", lambda: ["an H200"])
    bench = Bench(tmp_path)
    only_llama(bench.record)
    bench.run(Counted(0), gpus=(2,), rounds=3)
    runs = [run for run in bench.runs() if run.subject.startswith("krasis, 2 GPUs")]
    assert {run.error for run in runs} == {"needs 2 GPUs, this machine has 1"}
    assert {run.round for run in runs if run.subject == "krasis, 2 GPUs of 1 GiB"} == {0, 1, 2}


def test_chosen_rows_go_on_in_later_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine: what is compared is measured anew, what is missing of earlier rounds is not."""
    monkeypatch.setattr(work, "gpu_names", lambda: ["an H200"])
    bench = Bench(tmp_path)
    assert bench.run(Counted(), gpus=(2,), rounds=4, names=("2 GPUs of", "CPU alone"), first_round=2)
    rounds = {run.subject: set[int]() for run in bench.runs(model=MODEL)}
    for run in bench.runs(model=MODEL):
        rounds[run.subject].add(run.round)
    assert rounds == {
        "krasis, 2 GPUs of 1 GiB": {2, 3},
        "krasis, CPU alone": {0},
        "llama.cpp, CPU alone": {0},
    }


@pytest.mark.slow
def test_on_doubles_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: None) -> None:
    """Rounds, the first of which begins with another program each, and logits of two against one."""
    truly = work.krasis_rows
    monkeypatch.setattr(
        work,
        "krasis_rows",
        lambda depth, *rest: [row for row in truly(depth, *rest) if row.every_round and depth == WHOLE],
    )
    bench = Bench(tmp_path)
    bench.sizes = replace(bench.sizes, device="double")
    assert bench.run(Counted(), gpus=(1, 2))
    for count in ("1 GPU", "2 GPUs"):
        for case in ("pp24", "tg3@24"):
            (run,) = bench.runs(subject=f"krasis, {count} of 1 GiB", case=case)
            assert run.error == ""
    (logits,) = bench.runs(case="logits")
    assert logits.subject == "krasis, 2 GPUs against 1"
    one, two = (np.load(next(tmp_path.rglob(f"*-{count}-*.npy"))).astype(np.float64) for count in (1, 2))
    distance = np.linalg.norm(two - one) / np.linalg.norm(one)  # sums in float32 may be the same, bit for bit
    assert logits.metrics["relative_distance"][0] == pytest.approx(distance)
    assert distance < 0.02
    assert np.linalg.norm(one) > 0
    # Every llama.cpp row of both counts, by its own flags.
    assert len({run.subject for run in bench.runs() if run.subject.startswith("llama.cpp")}) == 8


@pytest.fixture
def double() -> None:
    from krasis.formats.errors import NativeError
    from krasis.runtime.device.library import double_library

    try:
        double_library()
    except NativeError as error:
        if "KRASIS_CUDA_DOUBLE" in os.environ:
            raise
        pytest.skip(str(error))


# ---- the document ------------------------------------------------------------------------------------------

DOCS = SCRIPTS.parent / "docs"
RECORD = Record(DOCS / "measured" / "reference.h5")


def test_the_committed_document_is_what_the_record_gives(tmp_path: Path) -> None:
    """Nobody edits it by hand: ``run.py render --record docs/measured/reference.h5`` renews it."""
    shutil.copytree(DOCS / "plots", tmp_path / "plots")
    shutil.copytree(DOCS / "measured", tmp_path / "measured", ignore=shutil.ignore_patterns("*.h5", "*.json"))
    write_document(RECORD, tmp_path / "BENCHMARKS.md", None)
    assert (tmp_path / "BENCHMARKS.md").read_text() == (DOCS / "BENCHMARKS.md").read_text()


def test_other_machines_have_a_document_and_their_table_here(tmp_path: Path) -> None:
    record = DOCS / "measured" / "reference-h200.h5"
    copy = tmp_path / "measured" / "reference-h200.md"
    write_document(Record(record), copy, None)
    text = copy.read_text()
    assert text == (DOCS / "measured" / "reference-h200.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ik_llama.cpp, 1 GPU, best flags | 18 |")]
    assert rows[0] in (DOCS / "BENCHMARKS.md").read_text()


def test_the_readme_shows_six_rows_of_the_record(tmp_path: Path) -> None:
    readme = (SCRIPTS.parent / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(readme)
    section.update_readme(RECORD, copy, "docs/plots/reference.png")
    assert copy.read_text() == readme
    between = readme.split(section.README_BEGIN)[1].split(section.README_END)[0]
    assert between.count("\n| ") == 2 + section.README_ROWS
    copy.write_text("# Without marks\n")
    section.update_readme(RECORD, copy, "x.png")
    assert copy.read_text() == "# Without marks\n"


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_document(RECORD, tmp_path / "B.md", tmp_path / "plots")
    assert (tmp_path / "plots" / "reference.png").read_bytes()[:4] == b"\x89PNG"
    assert "(plots/reference.png)" in (tmp_path / "B.md").read_text()


def test_short_calls_are_shown_only_where_they_shared_a_wait(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.h5")
    record.set_facts("reference", RECORD.facts("reference"))
    common: dict[str, Any] = {
        "stage": "reference",
        "model": "qwen3-235b-a22b, one layer",
        "threads": 1,
        "round": 0,
    }
    cases = {"layer, 1 tokens": 0.0005, kt_floor.HANDED: 0.1, "layer, 512 tokens": 0.1}
    for shared in (False, True):
        extra = {"calls_a_wait": (500.0,)} if shared else {}
        record.add(
            Run(subject="kt-kernel x", case=case, metrics={"seconds": (seconds,), **extra}, **common)
            for case, seconds in cases.items()
        )
        text = "\n".join(section.sections(record, ""))
        assert "| layer, 512 tokens | 100 ms | 9.4 s |" in text
        assert ("| layer, 1 tokens | 0.50 ms | 0.047 s |" in text) == shared
        assert (f"| {kt_floor.HANDED} | 100 ms |" in text) == shared
        assert ("Calls of one token" in text) != shared


# ---- kt-kernel's runner, without kt-kernel -----------------------------------------------------------------


class FakeQueue:
    """Tasks take time when they are waited for, and a wait ends at a tick."""

    def __init__(self, task_s: float, tick_s: float) -> None:
        self.task_s, self.tick_s, self.now_s, self.waiting = task_s, tick_s, 0.0, 0
        self.seen: list[Any] = []

    def submit(self, task: Any) -> None:
        self.waiting += 1
        self.seen.append(task)

    def sync(self) -> None:
        self.now_s += self.waiting * self.task_s
        self.waiting = 0
        self.now_s = (int(self.now_s / self.tick_s) + 1) * self.tick_s


def fake_layer(queue: FakeQueue, experts: int = 16) -> Any:
    work_ = SimpleNamespace(
        experts=experts, top_k=2, hidden=64, intermediate=32, group=32, token=np.zeros((1, 64), np.float32)
    )
    moe = SimpleNamespace(
        forward_task=lambda _, __, ids, *rest: ids,
        write_weight_scale_to_buffer_task=lambda _, expert, *rest: expert,
    )
    return SimpleNamespace(work=work_, cpu=queue, moe=moe, class_name="AMXInt4_KGroup_MOE")


@pytest.mark.parametrize("task_s", [20e-6, 0.7e-3, 0.003, 0.4])
def test_ticks_do_not_count(monkeypatch: pytest.MonkeyPatch, task_s: float) -> None:
    queue = FakeQueue(task_s, 0.004)
    monkeypatch.setattr(kt_floor_runner.time, "perf_counter", lambda: queue.now_s)
    layer = fake_layer(queue)
    one = kt_floor_runner.layer_seconds(layer, 1)
    assert one.seconds == pytest.approx([task_s] * 3, rel=0.03)
    assert (one.calls == 1) == (task_s > 0.25)
    assert len(set(queue.seen)) > 1 or task_s > 0.25  # others each
    queue.seen.clear()
    handed = kt_floor_runner.hand_over_seconds(layer)
    assert handed is not None
    assert handed.seconds == pytest.approx([16 * task_s] * 3, rel=0.03)
    assert queue.seen[:16] == list(range(16))
    layer.class_name = "AMXInt4_MOE"
    assert kt_floor_runner.hand_over_seconds(layer) is None
