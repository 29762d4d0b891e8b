"""A manifest that contradicts the architecture is refused before any kernel sees a pointer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.architecture import Architecture
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.uniform import spec_of
from krasis.runtime.cpu.weights import LayerWeights, load_weights

DTYPES: dict[str, Any] = {
    "I8": np.int8,
    "U8": np.uint8,
    "F32": np.float32,
    "BF16": np.uint16,
    "F16": np.float16,
}


@dataclass(frozen=True)
class Blob:
    """The fields of a blob's record that matter here."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = "plain"


@dataclass
class FakeBundle:
    """A bundle of zeros."""

    architecture: Architecture
    blobs: dict[str, Blob]
    layouts: dict[str, str] = field(
        default_factory=lambda: {"dense": "int8-rows-r32k4", "cpu": "cpu-q8-r32-b32"}
    )
    path: Path = Path("fake.krasis")

    @property
    def manifest(self) -> FakeBundle:
        return self

    @property
    def spec(self) -> ModelSpec:
        return spec_of(self.architecture)

    def blob(self, name: str) -> Blob:
        if name not in self.blobs:
            raise FormatError("the bundle has no such blob", where=name)
        return self.blobs[name]

    def map(self, name: str) -> np.ndarray:
        return np.zeros(self.blobs[name].shape, dtype=DTYPES[self.blobs[name].dtype])


def sound(a: Architecture) -> FakeBundle:
    rows, h = -(-a.vocab_size // 32), a.hidden_size
    blobs = {
        "embedding": Blob("BF16", (a.vocab_size, h)),
        "final_norm": Blob("BF16", (h,)),
        "lm_head": Blob("I8", (rows, h // 4, 32, 4), "int8-rows-r32k4"),
        "lm_head.scale": Blob("F32", (rows * 32,)),
    }
    record_bytes = -(-3 * h * a.expert_intermediate_size // 1024 * 1088 // 4096) * 4096
    for index in range(a.num_layers):
        layer = {
            "attention.norm": Blob("BF16", (h,)),
            "attention.qkv": Blob("I8", (a.qkv_rows // 32, h // 4, 32, 4), "int8-rows-r32k4"),
            "attention.qkv.scale": Blob("F32", (a.qkv_rows,)),
            "attention.q_norm": Blob("F32", (a.head_dim,)),
            "attention.k_norm": Blob("F16", (a.head_dim,)),
            "attention.output": Blob("I8", (h // 32, a.attention_size // 4, 32, 4), "int8-rows-r32k4"),
            "attention.output.scale": Blob("F32", (h,)),
            "experts.norm": Blob("BF16", (h,)),
            "experts.router": Blob("F32", (a.num_experts, h)),
            "experts.cpu": Blob("U8", (a.num_experts, record_bytes), "cpu-q8-r32-b32"),
        }
        blobs |= {f"layers.{index}.{name}": blob for name, blob in layer.items()}
    return FakeBundle(a, blobs)


def test_a_sound_bundle_loads(shape: Architecture) -> None:
    weights = load_weights(sound(shape), "cpu")  # type: ignore[arg-type]
    assert len(weights.layers) == shape.num_layers
    assert weights.layers[0].vector("attention.k_norm").dtype == np.float32


def test_every_blob_is_needed_and_checked(shape: Architecture) -> None:
    for name, blob in sound(shape).blobs.items():
        for change in (
            None,
            replace(blob, shape=(*blob.shape[:-1], blob.shape[-1] * 2)),
            replace(blob, shape=(*blob.shape, 1)),
            replace(blob, dtype="U8" if blob.dtype == "I8" else "I8"),
            replace(blob, layout="cpu-i4-r32-b32"),
        ):
            bundle = sound(shape)
            if change is None:
                del bundle.blobs[name]
            else:
                bundle.blobs[name] = change
            with pytest.raises(FormatError, match=name.replace(".", r"\.")):
                load_weights(bundle, "cpu")  # type: ignore[arg-type]


def test_layouts_of_the_wrong_kind_are_refused(shape: Architecture) -> None:
    for layout in ("marlin-u4b8-g128-bf16", "plain", "int8-rows-r32k4", "cpu-q9-r32-b32"):
        bundle = sound(shape)
        bundle.layouts["cpu"] = layout
        with pytest.raises(FormatError, match="layout"):
            load_weights(bundle, "cpu")  # type: ignore[arg-type]


def test_a_missing_tier_is_named(shape: Architecture) -> None:
    with pytest.raises(MismatchError, match="no gpu experts"):
        load_weights(sound(shape), "gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 8, 2**31 - 1])
def test_numbers_of_experts_that_are_not_there(wrong: int) -> None:
    """Kernels trust them."""
    numbers = np.arange(8, dtype=np.int32).reshape(4, 2)
    layer = Layer(None, GatedMlp(32))
    weights = LayerWeights(layer, {"experts.router.table": numbers})
    np.testing.assert_array_equal(weights.table("experts.router.table", 8), numbers)
    numbers[2, 1] = wrong
    with pytest.raises(FormatError, match=rf"experts\.router\.table.*got {wrong}; limit 0\.\.7"):
        weights.table("experts.router.table", 8)
