"""Random bundles: sound, the same every time, and sane enough to measure with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.convert.cli import main as convert_main
from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinMxfp4Layout
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.weights import load_weights
from scripts.models.make_random_bundle import BundleRequest, bundle_bytes, make_bundle
from scripts.models.make_random_model import make_model
from scripts.models.model_files import Shape, hub_config
from scripts.models.model_shapes import BUNDLE_SHAPES, QWEN3_SHAPES, SHAPES, apply_overrides

SMALL = replace(
    QWEN3_SHAPES["qwen3-30b-a3b"],
    vocab_size=4096,
    hidden_size=256,
    moe_intermediate_size=128,
    num_experts=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=3,
    max_position_embeddings=2048,
)
REQUEST = BundleRequest(SMALL, seed=3, num_threads=2, pool_bytes=1 << 20)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "a.krasis"
    written: list[int] = []
    total = make_bundle(REQUEST, out, written.append)
    assert total == bundle_bytes(REQUEST) >= sum(written)
    return out


def test_it_is_sound(bundle: Path) -> None:
    assert verify_bundle(bundle) == []
    with Bundle.open(bundle) as opened:
        assert opened.manifest.recipe["random"] is True
        assert set(opened.manifest.layouts) == {"dense", "gpu", "cpu"}


@pytest.mark.parametrize(
    "changes",
    [{"tiers": ("gpu",), "gpu_group": 64}, {"tiers": ("cpu",), "cpu_format": "i4"}],
    ids=["gpu", "cpu"],
)
def test_one_tier(tmp_path: Path, changes: dict[str, Any]) -> None:
    request = replace(REQUEST, **changes)
    make_bundle(request, tmp_path / "a.krasis")
    assert verify_bundle(tmp_path / "a.krasis") == []
    with Bundle.open(tmp_path / "a.krasis") as opened:
        load_weights(opened, request.tiers[0])


def test_the_same_arguments_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    make_bundle(replace(REQUEST, num_threads=1), tmp_path / "again.krasis")
    for path in bundle.iterdir():
        assert path.read_bytes() == (tmp_path / "again.krasis" / path.name).read_bytes(), path.name
    make_bundle(replace(REQUEST, seed=4), tmp_path / "other.krasis")
    for name in ("cpu-000.safetensors", "gpu-000.safetensors", "dense-000.safetensors"):
        assert (bundle / name).read_bytes() != (tmp_path / "other.krasis" / name).read_bytes()


def test_what_is_there_or_too_large_is_refused(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        make_bundle(REQUEST, bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    huge = BundleRequest(replace(QWEN3_SHAPES["qwen3-235b-a22b"], num_hidden_layers=2000))
    with pytest.raises(ResourceError, match="too little room"):
        make_bundle(huge, tmp_path / "huge.krasis")
    assert not list(tmp_path.iterdir())


def test_weights_have_no_bias_and_the_right_spread(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        tiers = {tier: load_weights(opened, tier) for tier in ("gpu", "cpu")}
    qkv = tiers["gpu"].layers[0].int8("attention.qkv")
    assert Int8RowsLayout().unpack(qkv.codes, qkv.scales).std() == pytest.approx(256**-0.5, rel=0.05)
    for weights in tiers.values():
        seen = []
        for record in weights.layers[1].records()[:3]:
            gate, up, down = weights.expert_layout.unpack_expert(record, 256, 128)
            for part, fan_in, gain in ((gate, 256, 1.0), (up, 256, 1.0), (down, 128, 6**-0.5)):
                std = gain * fan_in**-0.5
                assert part.std() == pytest.approx(std, rel=0.1)
                assert abs(part.mean()) < 0.05 * std
            seen.append(gate)
        # Experts differ, and are not the same numbers in another order of rows.
        assert abs(np.corrcoef(seen[0].ravel(), seen[1].ravel())[0, 1]) < 0.05


def test_tokens_spread_over_the_experts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[np.ndarray] = []
    route = Kernels.route

    def counting(self: Any, logits: Any, router: Any, ids: np.ndarray, *rest: Any) -> None:
        route(self, logits, router, ids, *rest)
        if len(ids) > 1:  # one row: recorded for decode, not run yet
            counts.append(np.bincount(ids.ravel(), minlength=32))

    monkeypatch.setattr(Kernels, "route", counting)
    settings = EngineSettings(context=512, threads=2, device="cpu", prefault=False)
    with Engine.open(bundle, settings) as engine:
        logits = engine.prefill(np.random.default_rng(0).integers(0, 4096, 512), all_logits=True)
    assert 0.3 < logits.std() < 3
    assert len(counts) == 3
    for layer in counts:
        assert layer.sum() == 512 * 8
        assert layer.max() < 2 * layer.mean()
        assert layer.min() > 0.4 * layer.mean()


SMALLER = {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 256, "moe_intermediate_size": 64}
SMALLER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_experts_per_tok": 2}


DELTA = ("qwen3-next-80b-a3b", "qwen3.5-35b-a3b")


def smaller(name: str) -> Shape:
    """A shape of few layers, of all kinds that it has."""
    return apply_overrides(SHAPES[name], SMALLER | ({"num_hidden_layers": 4} if name in DELTA else {}), None)


@pytest.mark.parametrize("name", ["glm-4.5-air", "mixtral-8x7b", "olmoe-1b-7b", "glm-4.7-flash", *DELTA])
def test_shapes_of_other_families_run(tmp_path: Path, name: str) -> None:
    shape = smaller(name)
    make_bundle(BundleRequest(shape, gpu_group=64, pool_bytes=1 << 20), tmp_path / "a.krasis")
    assert verify_bundle(tmp_path / "a.krasis") == []
    settings = EngineSettings(device="cpu", context=64, threads=1)
    with Engine.open(tmp_path / "a.krasis", settings) as engine:
        assert 0.5 < np.std(engine.prefill(list(range(20)))) < 2


@pytest.mark.parametrize(
    "name", ["glm-4.5-air", "mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "glm-4.7-flash", *DELTA]
)
def test_checkpoints_of_families_convert(tmp_path: Path, name: str) -> None:
    shape = smaller(name)
    make_model(shape, tmp_path / "hf", 1, 1 << 30, pool_values=1 << 16)
    with pytest.raises(SystemExit) as ended:
        convert_main([str(tmp_path / "hf"), "-o", str(tmp_path / "a.krasis"), "--quiet", "--gpu-group", "64"])
    assert not ended.value.code
    with Bundle.open(tmp_path / "a.krasis") as bundle:
        assert bundle.spec.family == shape_family(shape).removesuffix("_text")


def shape_family(shape: Shape) -> str:
    """The model type of a shape."""
    return str(hub_config(shape)["model_type"])


def test_gpt_oss(tmp_path: Path) -> None:
    """MXFP4 tiles whose weights are as large as they should be, biases, sinks; and it runs."""
    shape = BUNDLE_SHAPES["gpt-oss-20b"].changed(
        {
            "num_hidden_layers": 2,
            "num_experts": 4,
            "hidden_size": 192,
            "intermediate_size": 128,
            "vocab_size": 512,
        }
    )
    make_bundle(
        BundleRequest(shape, 3, ("gpu", "cpu"), cpu_format="mxfp4", pool_bytes=1 << 18), tmp_path / "a.krasis"
    )
    assert verify_bundle(tmp_path / "a.krasis") == []
    with Bundle.open(tmp_path / "a.krasis") as opened:
        assert opened.map("layers.1.attention.sinks").dtype == np.float32
        for layout in (CpuTileLayout("mxfp4"), MarlinMxfp4Layout()):
            record = opened.map(f"layers.1.experts.{layout.tier}")[3]
            gate, up, down = layout.unpack_expert(record, 192, 128)
            assert [float(one.std()) for one in (gate, up)] == pytest.approx([192**-0.5] * 2, rel=0.15)
            assert float(down.std()) == pytest.approx((4 * 128) ** -0.5, rel=0.15)
    settings = EngineSettings(context=32, threads=1, prefault=False, device="cpu")
    with Engine.open(tmp_path / "a.krasis", settings) as engine:
        assert np.isfinite(engine.prefill([1, 2, 3])).all()


def test_glm_5_3(tmp_path: Path) -> None:
    """Mixed streams, both kinds of mixers, dense layers and experts; and it runs."""
    sizes = {"num_hidden_layers": 5, "num_experts": 4, "hidden_size": 128, "moe_intermediate_size": 64}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 320, "num_experts_per_tok": 2}
    make_bundle(
        BundleRequest(BUNDLE_SHAPES["glm-5.3-flash"].changed(sizes), 5, gpu_group=64, pool_bytes=1 << 18),
        tmp_path / "a.krasis",
    )
    assert verify_bundle(tmp_path / "a.krasis") == []
    settings = EngineSettings(context=64, threads=1, prefault=False, device="cpu")
    with Engine.open(tmp_path / "a.krasis", settings) as engine:
        assert 0.5 < np.std(engine.prefill(list(range(20)))) < 2
