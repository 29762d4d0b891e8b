"""The comparison with other programs: output is read right, failures stay visible, records come back."""

import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from scripts.bench import contention, layer, peers, process, provision, quality, speed, stats, tables, weights
from scripts.bench.cli import main
from scripts.bench.document import render
from scripts.bench.goals import goals
from scripts.bench.record import Record, Run
from scripts.models.moe_gguf import write_gguf

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

TINY = SCRIPTS.parent / "tests" / "assets" / "tiny-qwen3-moe"

# Trimmed from llama-bench's own output; the fields used here are as they were, with a log line before them.
LLAMA_OUTPUT = """load_backend: loaded CPU backend
[
  {
    "build_commit": "0c1e570",
    "build_number": 1,
    "n_threads": 2,
    "n_prompt": 512,
    "n_gen": 0,
    "avg_ts": 168.0,
    "samples_ns": [ 3047619047, 3047619047 ],
    "samples_ts": [ 160.0, 176.0 ]
  },
  {
    "build_commit": "0c1e570",
    "build_number": 1,
    "n_threads": 2,
    "n_prompt": 0,
    "n_gen": 64,
    "avg_ts": 13.4767,
    "samples_ts": [ 14.1178, 12.8356 ]
  }
]
"""
KRASIS_OUTPUT = json.dumps(
    {
        "cases": {
            "tg64": {
                "tokens_per_s": [58.7, 56.3],
                "read_gbps": [31.5, 34.2, 36.4],
                "weights_gbps": [32.3, 31.0],
            }
        },
        "isa": "avx512_vnni",
        "token_bytes": 549953024,
        "huge_page_fraction": 0.87,
        "library_sha256": "7cee7a72cbd1",
    }
)
KT_OUTPUT = """From per-expert pointers (gate_projs)
CPUInfer[0x56359caed260]: Goodbye
{"tokens_per_s": [55.5, 65], "weights_gbps": [1.1, 1.3], "class": "MOE", "variant": "avx2", "version": "1"}
"""
WORK = peers.Work("m", Path("m.krasis"), Path("m.gguf"), 2, prompts=(512, 2048), generate=(64,), repeats=3)


def run_of(subject: str, number: int, *rates: float, **fields: Any) -> Run:
    """A decode run with those samples."""
    metrics = {"tokens_per_s": rates} if rates else {}
    base = {"stage": "decode", "model": "m", "case": "tg64", "threads": 1}
    return Run(subject=subject, round=number, metrics=metrics, **{**base, **fields})


def test_llama_bench_output_is_read() -> None:
    parsed = peers.parse_llama_bench(LLAMA_OUTPUT)
    assert parsed.cases["pp512"]["tokens_per_s"] == (160.0, 176.0)
    assert parsed.cases["tg64"]["tokens_per_s"] == (14.1178, 12.8356)
    assert parsed.version == "0c1e570 (1)"


@pytest.mark.parametrize(
    "output", ["", "error: unknown model\n", "[]", '[{"n_prompt": 1, "n_gen": 0}]', LLAMA_OUTPUT[:-30]]
)
def test_other_output_is_not_taken_for_a_result(output: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        peers.parse_llama_bench(output)


def test_a_speed_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no speed for pp512"):
        peers.parse_llama_bench(LLAMA_OUTPUT.replace("[ 160.0, 176.0 ]", "[ ]"))


def test_krasis_and_kt_output_are_read() -> None:
    parsed = peers.parse_krasis(KRASIS_OUTPUT)
    assert parsed.cases["tg64"]["read_gbps"] == (31.5, 34.2, 36.4)
    assert parsed.cases["tg64"]["token_bytes"] == (549953024.0,)
    metrics, version = layer.parse(KT_OUTPUT)
    assert metrics == {"tokens_per_s": (55.5, 65.0), "weights_gbps": (1.1, 1.3)}
    assert version == "1, MOE, avx2 build"


def test_peers_get_the_same_work_and_their_best_flags() -> None:
    llama = peers.llama_cpp(Path("llama-bench")).arguments(WORK)
    ik = peers.ik_llama_cpp(Path("ik-bench")).arguments(WORK)
    ours = peers.Krasis().arguments(WORK)
    for arguments in (llama, ik, ours):
        text = " ".join(arguments)
        assert "-p 512,2048" in text
        assert "-n 64" in text
        assert "-t 2" in text
        assert "-r 3" in text
    assert " ".join(llama).count("-lm none") == 1
    assert "-rtr 1 -mmp 0" in " ".join(ik)


def test_stages_of_the_cpu_hide_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "gpu_names", lambda: ["a GPU"])
    assert speed.on_the_cpu(peers.llama_cpp(Path("x"))).env == {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setattr(speed, "gpu_names", list)
    assert speed.on_the_cpu(peers.llama_cpp(Path("x"))).env == {}


def test_kernels_are_timed_alone_too(tmp_path: Path) -> None:
    """On both instruction sets and formats; only these rows are held to the read bandwidth."""
    alone = [one for one in layer.kernels(provision.Found(tmp_path)) if one.subject.startswith(layer.ALONE)]
    assert {(one.subject, one.case) for one in alone} == {
        (f"krasis kernels{isa}", bits) for isa in ("", " (avx2)") for bits in ("4 bit", "8 bit")
    }
    common = {"stage": "layer", "model": "m", "case": "4 bit", "threads": 1, "round": 0}
    runs = [
        Run(subject="krasis", metrics={"tokens_per_s": (200.0,), "fraction": (0.8,)}, **common),
        Run(subject="krasis kernels", metrics={"tokens_per_s": (220.0,), "fraction": (0.95,)}, **common),
        Run(subject="kt-kernel rawint4", metrics={"tokens_per_s": (100.0,)}, **common),
    ]
    found = {goal.what: goal.met for goal in goals(runs)}
    assert found == {
        "m, MoE layer, 1 thr, against kt-kernel rawint4": True,
        "m, 4 bit, 1 thr, krasis kernels alone: share of read bandwidth": True,
    }
    assert "| 4 bit | krasis kernels | 1 | 220 | \u2013 | 95 % | \u2013 | \u2013 |" in tables.layer_tables(
        runs
    )


def test_a_program_that_fails_is_recorded_with_its_words() -> None:
    script = "import sys; print('loading'); sys.exit('cannot map the model')"
    broken = replace(peers.llama_cpp(Path(sys.executable)), flags=())
    outcome = process.run([sys.executable, "-c", script])
    assert outcome.error == "exit status 1: cannot map the model"
    runs = speed.execute(broken, WORK, "decode", 0, 30)  # a Python that is given llama-bench's options
    assert [run.case for run in runs] == ["pp512", "pp2048", "tg64"]
    assert all(run.error and not run.metrics for run in runs)
    assert str(sys.executable) in runs[0].command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/program"], "cannot be started"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "stopped after 1 s"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], "SIGSEGV"),
    ],
)
def test_every_kind_of_failure_has_a_reason(arguments: list[str], words: str) -> None:
    assert words in process.run(arguments, timeout_s=1).error


def test_a_missing_peer_is_an_error_of_every_case() -> None:
    found = provision.given("off", "--ik-llama-bench")
    runs = speed.execute(peers.ik_llama_cpp(found.path, found.missing), WORK, "prefill", 1, 30)
    assert {run.error for run in runs} == {"not run: no --ik-llama-bench was given"}


def test_a_case_that_the_program_left_out_is_an_error(tmp_path: Path) -> None:
    fake = tmp_path / "llama-bench"
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{LLAMA_OUTPUT}END\n")
    fake.chmod(0o755)
    by_case = {run.case: run for run in speed.execute(peers.llama_cpp(fake), WORK, "decode", 0, 30)}
    assert by_case["tg64"].metrics["tokens_per_s"] == (14.1178, 12.8356)
    assert by_case["pp2048"].error == "the program did not report this case"


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = Record(tmp_path / "bench.h5")
    assert record.runs() == []
    runs = [
        run_of("krasis", 0, 1.25, 1.5, command="a b", version="1/2", note="n", load_1m=0.25, started_s=9.0),
        run_of("ik_llama.cpp", 0, error="exit status 1: no", wall_s=2.5),
        run_of("krasis", 0, 3.0, stage="prefill", case="pp512", model="a/b"),
    ]
    record.add(runs)
    assert sorted(record.runs(), key=lambda run: run.path) == sorted(runs, key=lambda run: run.path)
    assert record.runs("prefill") == [runs[2]]
    again = replace(runs[0], metrics={"tokens_per_s": (2.0,)})
    record.add([again])
    assert again in record.runs("decode")
    assert len(record.runs("decode")) == 2
    record.drop("decode")
    assert record.runs() == [runs[2]]
    record.set_facts("machine", {"cpu": "x", "num_cpus": 2, "memory_gib": 1.5})
    assert record.facts("machine") == {"cpu": "x", "num_cpus": 2, "memory_gib": 1.5}


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slows down between rounds; the ratio of medians over all rounds would be another.
    ours = [
        run_of("krasis", 0, 30.0),
        run_of("krasis", 1, 10.0),
        run_of("krasis", 2, 11.0),
        run_of("krasis", 3),
    ]
    theirs = [run_of("x", 0, 20.0), run_of("x", 1, 5.0), run_of("x", 2, 22.0), run_of("x", 3, 1.0)]
    found = stats.ratios(ours, theirs, "tokens_per_s")
    assert found == stats.Spread(1.5, 0.5, 2.0, 3)
    assert stats.ratios(ours, [run_of("x", 9, 1.0)], "tokens_per_s") is None


def test_only_whole_rounds_are_skipped_on_resume(tmp_path: Path) -> None:
    record = Record(tmp_path / "bench.h5")
    record.add([run_of("krasis", 0, 1.0), run_of("x", 0, error="no"), run_of("krasis", 1, 1.0)])
    work = replace(WORK, threads=1, prompts=())
    assert speed.done_rounds(record, "decode", work, ["krasis", "x"]) == {0}
    assert speed.done_rounds(record, "decode", replace(work, threads=2), ["krasis", "x"]) == set()


def test_rounds_begin_with_another_program() -> None:
    assert [speed.in_turn(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_the_document_shows_figures_ratios_and_failures(tmp_path: Path) -> None:
    record = Record(tmp_path / "bench.h5")
    record.add([run_of("krasis", i, 60.0 + i, command="run-krasis", started_s=1.0) for i in range(3)])
    record.add([run_of("llama.cpp", i, 40.0) for i in range(3)])
    record.add([run_of("ik_llama.cpp", i, error="exit status 1: no such | model") for i in range(3)])
    text = render(record, record.runs(), {})
    row = next(line for line in text.splitlines() if line.startswith("| tg64"))
    assert "61.0 (60.0\u201362.0)" in row
    assert "**1.52x** (1.50\u20131.55)" in row
    assert "no such / model" in row  # a bar would open another column
    assert "- decode, ik_llama.cpp: exit status 1: no such | model" in text
    assert "Stage `quality` has not been run" in text
    assert "run-krasis" in text
    verdicts = {goal.what: goal.met for goal in goals(record.runs())}
    assert verdicts == {
        "m, tg64, 1 thr, against llama.cpp": True,
        "m, tg64, 1 thr, against ik_llama.cpp": None,
    }


def test_goals_compare_errors_at_equal_bits_only() -> None:
    def of(subject: str, bits: float, kl: float) -> Run:
        metrics = {"bits_per_weight": (bits,), "kl_nats": (kl,), "relative_mse": (kl,)}
        fields = {"stage": "quality", "case": "experts", "model": "tiny", "threads": 0, "round": 0}
        return Run(subject=subject, metrics=metrics, **fields)

    found = goals(
        [
            of("krasis cpu int4", 4.52, 0.2),
            of("llama.cpp Q4_0", 4.5, 0.1),
            of("krasis gpu int4 g128", 4.1, 0.3),
        ]
    )
    assert [goal.met for goal in found] == [False, False]
    assert all("cpu int4 below llama.cpp Q4_0" in goal.what for goal in found)


def test_kept_share_is_beside_over_alone() -> None:
    alone, beside = (
        run_of("krasis", 0, 40.0, case="tg32 alone"),
        run_of("krasis", 0, 22.0, case="tg32 beside"),
    )
    found = tables.kept([alone], [beside])
    assert found is not None
    assert math.isclose(found.median, 0.55)
    text = tables.contention_table([alone, beside])
    assert "55 %" in text


def test_busy_cores_are_busy_and_end() -> None:
    def spent() -> float:
        return sum(os.times()[2:4])

    before = spent()
    with contention.busy_cores():
        time.sleep(0.5)
    assert spent() - before > 0.05  # children's time counts once they were waited for


def test_divergence_of_a_known_pair() -> None:
    exact = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found = quality.compare(lambda _: (other + 3.0).astype(np.float32), [exact], [[0, 1]])
    assert math.isclose(found["kl_nats"][0], 0.5 * math.log(2) / 2 - 0.25 * math.log(2) / 2, rel_tol=1e-5)
    assert math.isclose(found["perplexity"][0], 2.0, rel_tol=1e-5)
    assert found["top1_share"] == (0.5,)


def test_the_command_runs_a_stage_and_writes_everything(tmp_path: Path, places: list[str]) -> None:
    options = ["--stage", "decode,hybrid", "--llama-bench", "off", "--kt-kernel", "off", "--gpus", "0"]
    result = CliRunner().invoke(main, ["run", *options, *places])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "B.md").read_text().startswith("# Benchmarks\n")
    assert Record(tmp_path / "r.h5").facts("machine")["num_cpus"] == len(os.sched_getaffinity(0))
    refused = CliRunner().invoke(main, ["run", "--stage", "nonsense", *places])
    assert refused.exit_code == 2
    unpaired = CliRunner().invoke(main, ["run", "--model", "a", "--stage", "decode", *places])
    assert "same number of times" in unpaired.output


def test_sources_of_one_model_agree(tmp_path: Path) -> None:
    write_gguf(TINY, tmp_path / "q8.gguf", "q8_0", "tiny", progress=False)
    settings = ConvertSettings(tiers=("cpu",), num_threads=1)
    convert(prepare([TINY, tmp_path / "q8.gguf"], tmp_path / "b.krasis", settings, Reporter(0)), Reporter(0))
    exact = weights.CheckpointSource(TINY)
    from_gguf = weights.GgufSource(tmp_path / "q8.gguf")
    from_bundle = weights.BundleSource(tmp_path / "b.krasis", "cpu")
    assert (exact.num_layers, exact.num_experts) == (from_gguf.num_layers, from_gguf.num_experts) == (4, 8)
    for left, right in zip(from_gguf.expert(3, 5), from_bundle.expert(3, 5), strict=True):
        np.testing.assert_array_equal(left, right)  # Q8_0 is carried over without loss
    assert 1e-6 < weights.relative_mse(from_gguf, exact) < 1e-4
    assert from_gguf.expert_bits() == from_bundle.expert_bits() == 8.5
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate"):
        truth = exact.dense(f"model.layers.2.{name}.weight")
        for source in (from_gguf, from_bundle):
            found = source.dense(f"model.layers.2.{name}.weight")
            assert float(np.square(found - truth).sum() / np.square(truth).sum()) < 1e-3
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert from_gguf.dense(name).shape == from_bundle.dense(name).shape == exact.dense(name).shape
