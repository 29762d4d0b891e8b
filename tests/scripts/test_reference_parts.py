"""Parts of the reference table: how many layers fit, which commands are run, what their output means."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.process import Outcome
from scripts.bench.reference import files, results, watch
from scripts.bench.reference.files import Kind
from scripts.bench.reference.rows import BOTH, WHOLE, Row, Sizes, ik_rows, krasis_rows, llama_rows
from scripts.bench.reference.watch import GIB, Watched
from scripts.bench.shown import without_places
from tests.support.patience import PATIENCE_S

KIND = Kind("qwen3-235b-a22b")
SIZES = Sizes(10_000, 128, 16 * GIB, 32)
BUNDLE, GGUF = Path("m.krasis"), Path("m.gguf")


# ---- files -------------------------------------------------------------------------------------------------


def test_as_many_layers_as_memory_has_room_for() -> None:
    assert KIND.all_layers == 94
    assert files.layers_for_one(KIND, 237 * GIB) == 94
    assert files.layers_for_both(KIND, 237 * GIB) == 45
    bundle, both = KIND.bundle_bytes(20), KIND.bundle_bytes(20) + KIND.gguf_bytes(20) + KIND.expert_bytes(20)
    assert files.layers_for_one(KIND, bundle) == 20
    assert files.layers_for_one(KIND, bundle - 1) == 19
    assert files.layers_for_both(KIND, both) == 20
    assert files.layers_for_both(KIND, both - 1) == 19
    assert files.layers_for_one(KIND, 1) == 1  # never none: what then fails says why
    # 128 experts of three 4096 x 1536 matrices, 18 bytes a 32 weights.
    assert KIND.expert_bytes(1) == 128 * 3 * 4096 * 1536 // 32 * 18
    assert KIND.gguf_bytes(94) / 1e9 == pytest.approx(136.4, abs=0.1)
    eight = Kind("qwen3-235b-a22b", expert_type="q8_0", cpu_format="q8")
    assert eight.expert_bytes(3) * 18 == KIND.expert_bytes(3) * 34


def test_only_what_is_wanted_stays(tmp_path: Path) -> None:
    kept, wanted = files.bundle(KIND, 3, tmp_path), files.gguf(KIND, 3, tmp_path)
    assert kept != files.bundle(KIND, 4, tmp_path)
    kept.mkdir()
    (kept / "manifest.json").write_text("{}")
    (tmp_path / "older.gguf.partial").write_bytes(b"x")
    old = files.bundle(KIND, 94, tmp_path)
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    files.make_room(tmp_path, (kept, wanted))
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert (kept / "manifest.json").exists()


# ---- rows --------------------------------------------------------------------------------------------------


def all_rows(gpus: tuple[int, ...] = (1, 2), **sizes: Any) -> list[Row]:
    chosen = Sizes(**{"prompt": 10_000, "generate": 128, "cap_bytes": 16 * GIB, "threads": 32, **sizes})
    binary = Path("llama-bench")
    return [
        *krasis_rows(WHOLE, gpus, chosen, Path("logits")),
        *krasis_rows(BOTH, gpus, chosen, Path("logits")),
        *llama_rows(binary, "", gpus, chosen, KIND, 45),
        *ik_rows(Path("ik-bench"), "", gpus, chosen),
    ]


@pytest.mark.parametrize(
    "sizes",
    [{}, {"prompt": 700, "generate": 3}, {"prompt": 2048}, {"threads": 1}, {"cap_bytes": 8 * GIB}],
    ids=str,
)
def test_no_flag_is_given_twice(sizes: dict[str, int]) -> None:
    """llama-bench takes a flag given again as another thing to measure."""
    rows = all_rows(**sizes)
    for row in rows:
        command = row.command(BUNDLE, GGUF)
        flags = [part for part in command if part.startswith("-") and not part.lstrip("-").isdigit()]
        assert len(flags) == len(set(flags)), row.subject
        assert (str(BUNDLE) in command) != (str(GGUF) in command)
    names = [(row.depth, row.subject) for row in rows]
    assert len(names) == len(set(names))


def value(row: Row, flag: str) -> str:
    return row.arguments[row.arguments.index(flag) + 1]


def test_every_program_gets_the_same_prompt_and_answer() -> None:
    rows = {(row.depth, row.subject): row for row in all_rows()}
    for (depth, subject), row in rows.items():
        alone = subject.endswith("CPU alone")
        assert row.cases == (("pp2048", "tg32@2048") if alone else ("pp10000", "tg128@10000"))
        assert row.every_round == (subject.endswith(("GiB", "best flags", "default flags")) and not alone), (
            subject
        )
        assert row.env["CUDA_VISIBLE_DEVICES"] == ("", "0", "0,1")[row.gpus]
        if row.program == "krasis":
            assert (value(row, "--prompt"), value(row, "--generate")) == (str(row.prompt), str(row.generate))
            assert depth in (WHOLE, BOTH)
        else:
            assert (value(row, "-p"), value(row, "-n"), value(row, "-r")) == (str(row.prompt), "0", "1")
            assert value(row, "-pg") == f"{row.prompt},{row.generate}"
    best = rows[BOTH, "llama.cpp, 1 GPU, best flags"]
    assert (value(best, "-ub"), value(best, "-ncmoe"), value(best, "-t")) == ("10240", "999", "32")
    fitting = rows[BOTH, "llama.cpp, 1 GPU, experts of 5 layers in VRAM"]
    assert value(fitting, "-ncmoe") == "40"  # of 45: the experts of so many stay in RAM
    assert value(rows[BOTH, "llama.cpp, 1 GPU, 16 threads"], "-t") == "16"
    assert value(rows[BOTH, "llama.cpp, 1 GPU, -ub 512"], "-ub") == "512"
    # ik_llama.cpp's bench has no --progress.
    assert "--progress" not in rows[BOTH, "ik_llama.cpp, 2 GPUs, best flags"].arguments
    capped, whole = (rows[WHOLE, f"krasis, 2 GPUs{rest}"] for rest in (" of 16 GiB", ", all their memory"))
    assert value(capped, "--vram") == str(16 * GIB)
    assert value(whole, "--vram") == "0"


def test_without_gpus_there_are_rows_of_the_cpu_alone() -> None:
    assert [row.subject for row in all_rows(gpus=(0,))] == [
        *("krasis, CPU alone", "krasis, CPU alone", "llama.cpp, CPU alone")
    ]


# ---- results -----------------------------------------------------------------------------------------------

LLAMA_ROW = next(row for row in all_rows() if row.subject == "llama.cpp, 1 GPU, best flags")
KRASIS_ROW = next(row for row in all_rows() if row.subject == "krasis, 2 GPUs of 16 GiB")
# Trimmed from llama-bench -p 10000 -n 0 -pg 10000,128 -r 1 -o json.
LLAMA = [
    {"build_commit": "0c1e570", "build_number": 1, "n_prompt": 10000, "n_gen": 0, "samples_ns": [2500000000]},
    {
        "build_commit": "0c1e570",
        "build_number": 1,
        "n_prompt": 10000,
        "n_gen": 128,
        "samples_ns": [8900000000],
    },
]
STAMPS = (
    (1.0, "llama-bench: benchmark 1/2: starting"),
    (2.0, "llama-bench: benchmark 1/2: warmup prompt run"),
    (39.5, "llama-bench: benchmark 1/2: prompt run 1/1"),
    (44.0, "llama-bench: benchmark 2/2: prompt run 1/1"),
)


def watched(output: str, error: str = "", stamps: tuple[tuple[float, str], ...] = STAMPS) -> Watched:
    return Watched(Outcome("a command", output, error, 5.0, 6.0, 0.5), stamps, 3 * GIB, (GIB, 2 * GIB))


def test_an_answer_is_what_it_takes_beyond_its_prompt() -> None:
    cases, version = results.parse(LLAMA_ROW, watched("a log line\n" + json.dumps(LLAMA)))
    assert version == "0c1e570 (1)"
    assert cases["pp10000"]["tokens_per_s"] == (4000.0,)
    assert cases["tg128@10000"]["tokens_per_s"] == (20.0,)
    for metrics in cases.values():
        assert metrics["first_token_s"] == (39.5,)
        assert metrics["host_bytes"] == (3.0 * GIB,)
        assert metrics["vram_bytes"] == (1.0 * GIB, 2.0 * GIB)


def test_krasis_says_its_first_token_itself() -> None:
    output = {
        "first_token_s": 12.5,
        "library": "abc",
        "cases": {"pp10000": {"tokens_per_s": [9000.0]}, "tg128@10000": {"tokens_per_s": [16.0]}},
    }
    runs = results.runs_of(KRASIS_ROW, watched(json.dumps(output)), "m", 32, 2)
    assert [(run.case, run.metrics["tokens_per_s"], run.metrics["first_token_s"]) for run in runs] == [
        ("pp10000", (9000.0,), (12.5,)),
        ("tg128@10000", (16.0,), (12.5,)),
    ]
    assert {(run.stage, run.subject, run.round, run.threads, run.wall_s) for run in runs} == {
        ("reference", "krasis, 2 GPUs of 16 GiB", 2, 32, 6.0)
    }
    del output["cases"]["tg128@10000"]  # type: ignore[attr-defined]
    runs = results.runs_of(KRASIS_ROW, watched(json.dumps(output)), "m", 32, 2)
    assert [run.error for run in runs] == ["", "the program did not report this case"]


@pytest.mark.parametrize(
    "output",
    [
        "",
        "ggml_cuda: out of memory\n",
        "[]",
        json.dumps(LLAMA[:1]),
        json.dumps(LLAMA[1:]),
        json.dumps([{**LLAMA[0], "samples_ns": [0]}, LLAMA[1]]),
        json.dumps([LLAMA[0], {**LLAMA[1], "samples_ns": [2500000000]}]),
        json.dumps([{**LLAMA[0], "samples_ns": []}, LLAMA[1]]),
        json.dumps(LLAMA)[:-20],
    ],
)
def test_other_output_is_a_failure_not_a_figure(output: str) -> None:
    runs = results.runs_of(LLAMA_ROW, watched(output), "m", 32, 0)
    assert [run.case for run in runs] == ["pp10000", "tg128@10000"]
    assert all(run.error and not run.metrics for run in runs), runs
    failed = results.runs_of(LLAMA_ROW, watched(json.dumps(LLAMA), "exit status 1: no"), "m", 32, 0)
    assert all(run.error == "exit status 1: no" and not run.metrics for run in failed)


def test_the_first_token_of_llama_bench_ends_its_warm_up() -> None:
    assert results.first_token(STAMPS) == 39.5
    assert results.first_token(STAMPS[2:]) is None  # --no-warmup: the first prompt is the timed one
    assert results.first_token(()) is None
    assert results.first_token(STAMPS[:2]) is None


# ---- watch -------------------------------------------------------------------------------------------------


def run(text: str, timeout_s: float = 60.0, **env: str) -> Watched:
    return watch.run([sys.executable, "-c", text], env, timeout_s)


def test_what_a_program_says_is_kept_with_its_time() -> None:
    text = (
        "import os, sys, time; print('out', os.environ['GREETING'], flush=True);"
        "print('first', file=sys.stderr, flush=True); time.sleep(0.4);"
        "print('second', file=sys.stderr)"
    )
    found = run(text, GREETING="hello there")
    assert found.outcome.error == ""
    assert found.outcome.output == "out hello there\n"
    assert found.outcome.command.startswith("GREETING='hello there' ")
    (first_s, first), (second_s, second) = found.stamps
    assert (first, second) == ("first", "second")
    assert 0.3 < second_s - first_s < 30
    assert found.outcome.wall_s >= second_s


def test_a_failure_has_the_programs_own_words() -> None:
    assert run("import sys; sys.exit('cannot map the model')").outcome.error == (
        "exit status 1: cannot map the model"
    )
    assert "SIGSEGV" in run("import os; os.kill(os.getpid(), 11)").outcome.error
    missing = watch.run(["/no/such/program"], {}, 5)
    assert "cannot be started" in missing.outcome.error
    loud = run("import sys; sys.stdout.write('x' * 300_000); sys.stderr.write('y' * 300_000)")
    assert (loud.outcome.error, len(loud.outcome.output)) == ("", 300_000)


def ends(pid: int) -> bool:
    """Whether a process ends in the end."""
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_the_time_limit_ends_the_children_too(tmp_path: Path) -> None:
    text = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '100']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(100)"
    )
    begin = time.monotonic()
    found = run(text, timeout_s=2.0)
    assert found.outcome.error == "stopped after 2 s"
    assert time.monotonic() - begin < 30
    assert ends(int((tmp_path / "pid").read_text()))


def test_what_a_program_leaves_behind_is_ended(tmp_path: Path) -> None:
    """It would hold memory and GPUs while others are measured, and the output open."""
    text = (
        "import subprocess; child = subprocess.Popen(['sleep', '100']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); print('done')"
    )
    begin = time.monotonic()
    found = run(text)
    assert (found.outcome.error, found.outcome.output) == ("", "done\n")
    assert time.monotonic() - begin < 30
    assert ends(int((tmp_path / "pid").read_text()))


def test_memory_that_a_program_takes_is_seen() -> None:
    """Others share the machine: much more may be seen, hardly less."""
    text = "import time; held = bytearray(b'x') * 300_000_000; time.sleep(0.6)"
    assert any(run(text).host_bytes >= 200_000_000 for _ in range(20))


def test_gpu_memory_is_the_most_above_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase \"$*\" in *loop-ms*) printf '0, 500\\n1, 20\\n0, 900\\n1, [N/A]\\n0, 70'\n"
        "exec sleep 100;; *) printf '0, 100\\n1, 20\\n';; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = run("import time; time.sleep(1)")
    assert found.vram_bytes == (800 << 20, 0)


# ---- what is published -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "run /home/me/llama/bin/llama-bench -m /dev/shm/w/m.gguf -o json",
            "run llama-bench -m m.gguf -o json",
        ),
        ("PYTHONPATH=/tmp/a/kt:/opt/b/site python3", "PYTHONPATH=kt:site python3"),
        ("python3 /work/x/scripts/bench/run.py render", "python3 scripts/bench/run.py render"),
        ("'/a b/c d' \"/x/y/z.h5\"", "'/a b/c d' \"z.h5\""),
        ("4679 tok/s, krasis / it, 1/2; a/b/c; ~/models/x; ./run/it", None),
        ("see https://github.com/a/b/c and docs/plots/x.png", None),
        ("/proc/self/stat /sys/devices/system/node /dev/null /dev/shm /tmp", None),
    ],
)
def test_published_commands_have_no_places(text: str, shown: str | None) -> None:
    assert without_places(text) == (text if shown is None else shown)
    assert without_places(without_places(text)) == without_places(text)
