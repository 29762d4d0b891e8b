"""scripts/profile_token.py: every stage appears, the parts make the whole, and results stay the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.backend import CpuBackend
from scripts import profile_token

STAGES = {
    "rms_norm",
    "gemm_int8_rows: q, k, v",
    "qk_norm_rope_store",
    "attention",
    "quantize_acts",
    "gemm_int8_rows: attention output",
    "gemm_float: router",
    "route",
    "moe: experts",
    "gemm_int8_rows: output head",
    profile_token.OUTSIDE,
}


@pytest.fixture(scope="module")
def bundle(
    make_bundle: Callable[..., Path], make_config: Callable[..., dict[str, Any]], tokenizer_json: bytes
) -> Path:
    return make_bundle(make_config(), tokenizer=tokenizer_json)


def test_every_stage_is_reported(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    options = [str(bundle), "--tokens", "9", "--threads", "1,2", "--repeats", "2", "--json", str(out)]
    result = CliRunner().invoke(profile_token.main, options)
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["threads"] for record in records] == [1, 2]
    for record in records:
        for part in ("prefill", "decode"):
            assert set(record[part]) == STAGES
            assert all(seconds > 0 for seconds in record[part].values())
    fractions = [float(line.split()[-2]) for line in result.output.splitlines() if line.endswith(" %")]
    assert len(fractions) == 4 * len(STAGES)
    assert math.isclose(sum(fractions), 400, abs_tol=0.05 * len(fractions))


def test_watching_changes_no_result(bundle: Path) -> None:
    calls: list[str] = []

    def wrap(name: str, function: Callable[..., int]) -> Callable[..., int]:
        def counted(*arguments: object) -> int:
            calls.append(name)
            return function(*arguments)

        return counted

    settings = EngineSettings(threads=1, context=32)
    with Engine.open(bundle, settings) as plain, Engine.open(bundle, settings) as watched:
        backend = watched._backend
        assert isinstance(backend, CpuBackend)
        backend.watch(wrap)
        for engine in (plain, watched):
            engine.prefill([1, 2, 3])
        num_layers = plain.architecture.num_layers
        assert len(calls) == 10 * num_layers + 2
        assert calls.count("krasis_moe") == num_layers
        calls.clear()
        assert np.array_equal(plain.decode(4), watched.decode(4))
        assert len(calls) == 10 * num_layers + 2
