"""The decode and prefill benchmarks: they run, count right, and refuse work that was not done."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.formats.native import Pool
from scripts import bench_common, bench_decode, bench_prefill, profile_threads

TINY = bench_common.SHAPES["tiny"]


def test_decode_reports_every_case(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    options = ["--shape", "tiny", "--repeats", "3", "--threads", "1,2", "--isa", "avx2"]
    result = CliRunner().invoke(bench_decode.main, [*options, "--sample-gb", "0.002", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tiles"], row["threads"]) for row in rows] == [("q8", 1), ("q8", 2), ("i4", 1), ("i4", 2)]
    for row in rows:
        assert len(row["read_gbps"]) == len(row["decode_gbps"]) + 1 == 4
        for i, fraction in enumerate(row["fraction"]):
            around = (row["read_gbps"][i] + row["read_gbps"][i + 1]) / 2
            assert math.isclose(fraction, row["decode_gbps"][i] / around)
        # tokens/s through the stack and GB/s are the same measurement in other units
        token_bytes = (
            TINY.num_layers * TINY.top_k * 3 * 128 * 64 // 1024 * {"q8": 1088, "i4": 576}[row["tiles"]]
        )
        for rate, tokens in zip(row["decode_gbps"], row["tokens_per_s"], strict=True):
            assert math.isclose(rate * 1e9, tokens * token_bytes)
    assert len(result.output.splitlines()) == 1 + len(rows)


def test_prefill_reports_every_case(tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    options = ["--shape", "tiny", "--repeats", "2", "--threads", "1", "--isa", "avx2", "--layers", "3"]
    result = CliRunner().invoke(bench_prefill.main, [*options, "--tokens", "5,64", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tiles"], row["tokens"]) for row in rows] == [("q8", 5), ("q8", 64), ("i4", 5), ("i4", 64)]
    for row in rows:
        for rate, gmacs in zip(row["tokens_per_s"], row["gmacs"], strict=True):
            assert math.isclose(gmacs * 1e9, rate * 3 * TINY.top_k * TINY.expert_weights)


def test_instruction_sets_are_compared_turn_by_turn() -> None:
    rows = [{"isa": "a", "tokens_per_s": [1.0, 2.0, 4.0]}, {"isa": "b", "tokens_per_s": [2.0, 6.0, 4.0]}]
    assert "b / a: 2.00 (1.50-2.50)" in bench_prefill.against(rows)
    assert bench_prefill.against(rows[:1]) == ""


def test_the_threads_profile_accounts_for_the_time(tmp_path: Path) -> None:
    out = tmp_path / "threads.json"
    options = ["--shape", "tiny", "--repeats", "2", "--threads", "1,2", "--format", "q8", "--json", str(out)]
    result = CliRunner().invoke(profile_threads.main, options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        for sample in row["samples"]:
            assert 0 <= sample["least_busy"] <= sample["busy"] <= sample["most_busy"] <= 1
            # work of the phases, a thread = the threads' share of a layer's time
            assert math.isclose(sum(sample["phase_us"]), sample["busy"] * sample["layer_us"])
            assert sample["pieces"] >= 3
    assert len(result.output.splitlines()) == 3 * len(rows)


def test_unknown_shape_is_refused() -> None:
    result = CliRunner().invoke(bench_decode.main, ["--shape", "qwen9"])
    assert result.exit_code != 0
    assert "qwen9" in result.output
    assert "qwen3-30b-a3b" in result.output


@pytest.mark.parametrize("tiles", ["q8", "i4", "mxfp4"])
def test_stack_holds_valid_tiles(tiles: str) -> None:
    stack = bench_common.ExpertStack(TINY, tiles, 0)
    assert stack.num_layers == TINY.num_layers
    assert stack.layer_bytes == TINY.num_experts * TINY.stride_bytes(tiles)
    assert stack.layers[0] % (2 << 20) == 0
    batch = bench_common.MoeBatch(TINY, 3, 2)
    with Pool(1) as pool:
        assert batch.run(pool, [batch.arguments(stack, layer) for layer in range(2)]) > 0
    stack.close()


def test_a_skipped_expert_is_noticed() -> None:
    stack = bench_common.ExpertStack(TINY, "q8", 0)
    batch = bench_common.MoeBatch(TINY, 3, 1)
    batch.routings[0, 1, 0] = -1
    with Pool(1) as pool, pytest.raises(RuntimeError, match="5 of 6 pairs"):
        batch.run(pool, [batch.arguments(stack, 0)])


def test_routings_name_distinct_experts() -> None:
    batch = bench_common.MoeBatch(bench_common.SHAPES["qwen3-30b-a3b"], 4, 50)
    ids = np.sort(batch.routings, axis=-1)
    assert (np.diff(ids, axis=-1) > 0).all()
    assert len(np.unique(ids)) == 128
