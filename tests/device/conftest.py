"""Tests that mean most on a real GPU (scripts/device_check.sh runs them there); elsewhere the double stands
in.

KRASIS_CHECK_DEVICE: cuda or double; by default cuda where there is one. KRASIS_CHECK_SIZE: real or tiny
layers; by default real on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from scripts.device.context import Context
from scripts.device.limits import streaming_vram_bytes
from scripts.device.places import request_of
from scripts.models.make_random_bundle import make_bundle

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def device_name() -> str:
    """``cuda`` or ``double``; skips where neither can run and nobody said that one must."""
    import torch

    from krasis.formats.errors import NativeError
    from krasis.runtime.device.library import double_library

    chosen = os.environ.get("KRASIS_CHECK_DEVICE") or ("cuda" if torch.cuda.is_available() else "double")
    if chosen == "double":
        try:
            double_library()
        except NativeError as error:
            if "KRASIS_CUDA_DOUBLE" in os.environ:
                raise
            pytest.skip(str(error))
    return chosen


@pytest.fixture(scope="session")
def check(device_name: str, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Where, on what and how large."""
    size = os.environ.get("KRASIS_CHECK_SIZE") or ("real" if device_name == "cuda" else "tiny")
    return Context(tmp_path_factory.mktemp("check"), device_name, size)


@pytest.fixture
def open_engine(device_name: str) -> Iterator[Callable[..., Any]]:
    """(bundle, **settings) -> an engine on the device; closed at the end."""
    from krasis.runtime import Engine, EngineSettings

    with ExitStack() as closing:

        def open_it(bundle: Path, **settings: Any) -> Any:
            chosen = EngineSettings(**{"device": device_name, "prefault": False, **settings})
            return closing.enter_context(Engine.open(bundle, chosen))

        yield open_it


@pytest.fixture(scope="session")
def streaming_vram(device_name: str) -> Callable[..., int]:
    """(bundle, context) -> VRAM in which experts have no place for good."""

    def vram_bytes(bundle: Path, context: int) -> int:
        with Bundle.open(bundle) as opened:
            return streaming_vram_bytes(opened, context, device_name)

    return vram_bytes


@dataclass(frozen=True)
class Trained:
    """The committed model as a bundle, with the weights of both tiers."""

    bundle: Path
    gpu: ModelWeights
    cpu: ModelWeights

    def mixed(self, resident: np.ndarray) -> ModelWeights:
        """For the reference. resident: bool [layers, experts]: those of the gpu tier, others of the cpu's."""
        layouts = {True: self.gpu.expert_layout, False: self.cpu.expert_layout}
        layers = []
        for index, (own, other) in enumerate(zip(self.cpu.layers, self.gpu.layers, strict=True)):
            records = [
                (layouts[bool(on)], (other if on else own).experts[e]) for e, on in enumerate(resident[index])
            ]
            layers.append(replace(own, experts=records))
        return replace(self.cpu, layers=tuple(layers), expert_layout=AnyTier())


class AnyTier:
    """Unpacks (layout, record)."""

    @staticmethod
    def unpack_expert(record: Any, hidden: int, intermediate: int) -> Any:
        layout, data = record
        return layout.unpack_expert(data, hidden, intermediate)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The committed model."""
    from krasis.convert.conversion import convert, prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    source = REPOSITORY / "tests" / "assets" / "tiny-qwen3-moe"
    if not (source / "config.json").exists():
        pytest.skip("the trained model is not there")
    bundle, reporter = tmp_path_factory.mktemp("trained") / "tiny.krasis", Reporter(0)
    convert(prepare([source], bundle, ConvertSettings(num_threads=2), reporter), reporter)
    with Bundle.open(bundle) as opened:
        return Trained(bundle, load_weights(opened, "gpu"), load_weights(opened, "cpu"))


@pytest.fixture(scope="session")
def real_layers(
    check: Context, reference_logits: Callable[..., np.ndarray]
) -> Callable[[str], tuple[Path, list[int], np.ndarray]]:
    """(label of a stack) -> a bundle of three layers of random GPU experts, tokens, and their right logits.

    Three: a card that holds two layers' experts must then still stream.
    """
    made: dict[str, tuple[Path, list[int], np.ndarray]] = {}

    def make(label: str) -> tuple[Path, list[int], np.ndarray]:
        request = request_of(check, check.sizes.stack(label), 3, ("gpu",))
        fewer = {"vocab_size": 8192, "num_experts": 64 if label == "30b" else 32}
        shape = replace(request.shape, **fewer) if check.size == "real" else request.shape
        path = check.folder / f"{label}.krasis"
        make_bundle(replace(request, shape=shape), path)
        count = 480 if check.size == "real" else 30
        tokens = np.random.default_rng(4).integers(0, shape.vocab_size, count).tolist()
        with Bundle.open(path) as opened:
            return path, tokens, reference_logits(load_weights(opened, "gpu"), tokens)

    def once(label: str) -> tuple[Path, list[int], np.ndarray]:
        if label not in made:
            made[label] = make(label)
        return made[label]

    return once
