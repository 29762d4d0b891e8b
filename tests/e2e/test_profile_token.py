"""scripts/profile_token.py: every stage appears, the parts make the whole, and results stay the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.layouts.int8_rows import padded_rows
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.backend import CpuBackend
from scripts import profile_token
from tests.support.tiny_checkpoints import tiny

STAGES = {
    "rms_norm",
    "qk_norm_rope_store",
    "attention",
    "quantize_acts",
    "gemm_float: router",
    "route",
    "moe: experts",
    profile_token.OUTSIDE,
}


def stages_of(bundle: Path) -> set[str]:
    """With the products, which are named by their rows."""
    with Bundle.open(bundle) as opened:
        spec = opened.spec
    (mixer,) = {layer.mixer for layer in spec.layers}
    qkv = mixer.query_rows + 2 * mixer.key_rows
    products = {f"{qkv} rows", f"{spec.hidden} rows, added", f"{padded_rows(spec.vocab)} rows"}
    return STAGES | {f"gemm_int8_rows: {product}" for product in products}


@pytest.fixture(scope="module")
def bundle(
    make_bundle: Callable[..., Path], make_config: Callable[..., dict[str, Any]], tokenizer_json: bytes
) -> Path:
    return make_bundle(make_config(), tokenizer=tokenizer_json)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another family."""
    folder = tmp_path_factory.mktemp("olmoe")
    out = folder / "olmoe.krasis"
    options = [str(tiny("olmoe", folder / "hf")), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text"]
    result = CliRunner().invoke(convert, options)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("which", ["bundle", "olmoe"])
def test_every_stage_is_reported(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle = request.getfixturevalue(which)
    out = tmp_path / "profile.json"
    options = [str(bundle), "--tokens", "9", "--threads", "1,2", "--repeats", "2", "--json", str(out)]
    result = CliRunner().invoke(profile_token.main, options)
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    stages = stages_of(bundle)
    assert [record["threads"] for record in records] == [1, 2]
    for record in records:
        for part in ("prefill", "decode"):
            assert set(record[part]) == stages
            assert all(seconds > 0 for seconds in record[part].values())
    fractions = [float(line.split()[-2]) for line in result.output.splitlines() if line.endswith(" %")]
    assert len(fractions) == 4 * len(stages)
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
