"""The comparison with GPUs: flags, forms of equal bits, and what cannot run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.bench import hybrid, krasis_runner, peers, provision, speed, tables
from scripts.bench.record import Record, Run

WORK = peers.Work("m", Path("m.krasis"), Path("m.gguf"), 2, prompts=(512, 2048), generate=(64,), repeats=3)


def test_programs_get_their_flags_for_gpus() -> None:
    hybrid_llama = hybrid.hybrid_program(peers.llama_cpp(Path("llama-bench")), 2)
    assert hybrid_llama is not None
    assert "-ub 2048" in " ".join(hybrid_llama.arguments(WORK))
    hybrid_krasis = hybrid.hybrid_program(peers.Krasis(), 2)
    assert hybrid_krasis is not None
    assert "--gpus 2" in " ".join(hybrid_krasis.arguments(WORK))
    assert "--gpus" not in " ".join(peers.Krasis().arguments(WORK))
    assert hybrid.hybrid_program(peers.Krasis(name="krasis (avx2)", isa="avx2"), 2) is None


def test_a_model_that_fits_on_the_gpu_is_no_test_of_streaming() -> None:
    krasis_runner.check_streamed(SimpleNamespace(num_resident_experts=0))
    with pytest.raises(SystemExit, match="256 experts found room on the GPU"):
        krasis_runner.check_streamed(SimpleNamespace(num_resident_experts=256))


def test_hybrid_records_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid, "gpu_names", list)
    record = Record(tmp_path / "bench.h5")
    model = speed.Model("m", tmp_path, tmp_path, tmp_path)
    plan = speed.Plan((1,), (512,), (64,), 1, 1, 30.0)
    programs = [peers.Krasis(), peers.llama_cpp(Path("x")), peers.ik_llama_cpp(None, "not run")]
    quantize = provision.Found(None, "no llama-quantize")
    for _ in range(2):  # a second run adds nothing
        assert hybrid.run_stage(
            record, [model], programs, [0, 2], quantize, plan, tmp_path, lambda: True, print
        )
    assert len(record.runs()) == 4
    errors = {run.subject: run.error for run in record.runs()}
    assert errors["krasis"] == "needs 2 GPUs, this machine has 0"
    assert errors["llama.cpp"] == "needs 2 GPUs, this machine has 0"
    assert set(errors) == {"krasis", "kt-kernel", "llama.cpp", "ik_llama.cpp"}


def test_hybrid_compares_equal_bits_round_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU: both forms of Krasis and llama.cpp, interleaved; ratios between forms of the same bits."""
    monkeypatch.setattr(hybrid, "gpu_names", lambda: ["a GPU"])
    monkeypatch.setattr(hybrid, "int4_bundle", lambda *_: provision.Found(tmp_path / "int4.krasis"))
    monkeypatch.setattr(hybrid, "q4_0_gguf", lambda *_: provision.Found(None, "no llama-quantize"))
    speeds = {"krasis": 100.0, "krasis int4": 150.0, "llama.cpp": 50.0}
    asked: list[tuple[str, str, str]] = []

    def execute(program: peers.Program, work: peers.Work, stage: str, number: int, _: float) -> list[Run]:
        file = work.bundle if isinstance(program, peers.Krasis) else work.gguf
        asked.append((program.name, file.name, program.env["CUDA_VISIBLE_DEVICES"]))
        common = {"stage": stage, "model": work.model, "threads": 1, "subject": program.name, "round": number}
        if program.missing:
            return [Run(case="pp512", error=program.missing, **common)]
        return [Run(case="pp512", metrics={"tokens_per_s": (speeds[program.name],)}, **common)]

    monkeypatch.setattr(hybrid, "execute", execute)
    record = Record(tmp_path / "bench.h5")
    model = speed.Model("m", tmp_path, tmp_path / "m.gguf", tmp_path / "m.krasis")
    plan = speed.Plan((1,), (512,), (), 2, 1, 30.0)
    programs = [peers.Krasis(), peers.llama_cpp(Path("x")), peers.ik_llama_cpp(None, "not run")]
    missing = provision.Found(None, "")
    assert hybrid.run_stage(record, [model], programs, [1], missing, plan, tmp_path, lambda: True, print)
    assert asked.count(("krasis", "m.krasis", "0")) == 2
    assert asked.count(("krasis int4", "int4.krasis", "0")) == 2
    assert asked.count(("llama.cpp", "m.gguf", "0")) == 2
    assert [name for name, *_ in asked].count("llama.cpp Q4_0") == 1  # it cannot run: tried once
    table = tables.hybrid_tables(record.runs())
    assert "| pp512 | llama.cpp | 50.0 (50.0\u201350.0) | **2.00x** (2.00\u20132.00) |" in table
    assert "| pp512 | llama.cpp Q4_0 | no llama-quantize | \u2013 |" in table
