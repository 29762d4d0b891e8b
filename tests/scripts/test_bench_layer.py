"""One MoE layer for several programs: the same weights in every form, and results that are checked."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from scripts.bench import layer, provision, speed
from scripts.bench.document import render
from scripts.bench.goals import goals
from scripts.bench.layer_work import PARTS, LayerWork
from scripts.bench.record import Record

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

TINY = SCRIPTS.parent / "tests" / "assets" / "tiny-qwen3-moe"


@pytest.fixture(params=[(8, 32), (4, 32), (4, 128)], ids=str)
def work(request: pytest.FixtureRequest) -> LayerWork:
    bits, group = request.param
    return LayerWork(hidden=256, intermediate=128, experts=6, top_k=3, bits=bits, group=group)


def test_every_form_holds_the_same_weights(work: LayerWork) -> None:
    for expert, part in work.pieces():
        values = work.values(expert, part)
        n, k = work.shape(part)
        assert values.shape == (n, k)
        if work.bits == 8:
            blocks = work.q8_0(expert, part).reshape(n, -1)
            np.testing.assert_array_equal(
                gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0), values
            )
            continue
        nibbles, scales = work.nibbles(expert, part)
        codes = np.empty((n, k), np.float32)
        codes[:, ::2], codes[:, 1::2] = nibbles & 15, nibbles >> 4
        widened = np.repeat(scales.astype(np.float32), work.group, axis=1)
        np.testing.assert_array_equal((codes - 8) * widened, values)
        bits = scales.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any()  # bfloat16 holds them


def test_experts_and_tokens_are_no_copies_of_each_other(work: LayerWork) -> None:
    for part in PARTS:
        assert not np.array_equal(work.values(0, part), work.values(1, part))
    assert all(len(set(row)) == work.top_k for row in work.routings)
    assert len({tuple(row) for row in work.routings}) > 50
    assert not (work.token.view(np.uint32) & 0xFFFF).any()


def test_the_expected_result_is_torch_s(work: LayerWork) -> None:
    import torch

    x = torch.from_numpy(work.token).double()
    total = torch.zeros(1, work.hidden, dtype=torch.float64)
    for expert in work.routings[4].tolist():
        gate, up, down = (torch.from_numpy(work.values(expert, part)).double() for part in PARTS)
        inner = torch.nn.functional.silu(torch.nn.functional.linear(x, gate))
        inner = inner * torch.nn.functional.linear(x, up)
        total += torch.nn.functional.linear(inner, down) / work.top_k
    assert work.error(total.numpy(), 4) < 1e-6


def test_a_wrong_result_is_refused(work: LayerWork) -> None:
    right = work.expected()
    assert work.error(right + 0.01 * np.abs(right).max()) < 0.5
    for wrong in (
        np.zeros_like(right),
        right[::-1],
        2 * right,
        np.full_like(right, np.nan),
        work.expected(1),
    ):
        with pytest.raises(RuntimeError, match="result is wrong"):
            work.error(wrong)


def test_the_stage_on_this_machine(tmp_path: Path) -> None:
    """Without kt-kernel: Krasis's own results are checked, and the goals say that nothing was compared."""
    record = Record(tmp_path / "bench.h5")
    model = speed.Model("tiny", TINY, tmp_path, tmp_path)
    plan = speed.Plan((1,), (512,), (64,), pairs=1, repeats=1, timeout_s=120.0)
    missing = provision.given("off", "--kt-kernel")
    assert layer.run_stage(record, [model], missing, plan, lambda: True, lambda _: None)
    runs = record.runs("layer")
    ours = [run for run in runs if run.subject.startswith("krasis")]
    names = ("krasis", "krasis (avx2)", "krasis kernels", "krasis kernels (avx2)")
    assert {(run.subject, run.case) for run in ours} == {
        (name, case) for name in names for case in ("8 bit", "4 bit")
    }
    for run in ours:
        assert run.error == ""
        assert run.metrics["fraction"][0] > 0
        if not run.subject.startswith(
            layer.ALONE
        ):  # its weights are random codes: bench_decode checks the count
            assert 0 < run.metrics["relative_error"][0] < 0.03
    theirs = [run for run in runs if run not in ours]
    assert {run.error for run in theirs} == {"not run: no --kt-kernel was given"}
    verdicts = {goal.what: goal.met for goal in goals(runs) if "against" in goal.what}
    assert verdicts == {
        "tiny, MoE layer, 1 thr, against kt-kernel (8 bit)": None,
        "tiny, MoE layer, 1 thr, against kt-kernel (4 bit)": None,
    }
    text = render(record, runs, {})
    assert "rawint4-g128" in text
    assert "| of read bandwidth | error |" in text
