"""Which input features of each expert a text uses: E[x^2] of what its matrices multiply, for the converter.

``krasis-convert --calibration`` weighs the squared error of every weight by it. The file is HDF5:

    layers/{i}/hidden        float32 [experts, hidden]: of the inputs of gate and up
    layers/{i}/intermediate  float32 [experts, intermediate]: of the inputs of down
    layers/{i}/tokens        int64 [experts]: how many tokens were routed to the expert

for each layer that has experts, and says in its attributes where it comes from. Rows of experts that no token
reached are zero.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.files.atomic_file import AtomicFile
from krasis.formats.models.spec import ModelSpec
from krasis.formats.process.tool import tool_version
from krasis.runtime.cpu.float_backend import FloatBackend
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.settings import EngineSettings
from krasis.runtime.text.assets import TextAssets

KIND = "krasis importance"
FORMAT = 1

Progress = Callable[[int], object]


@dataclass(slots=True)
class LayerSums:
    """One layer's sums. hidden, intermediate: of squares, float64 [experts, n]. tokens: int64 [experts]."""

    hidden: npt.NDArray[np.float64]
    intermediate: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @classmethod
    def zero(cls, spec: ModelSpec, layer: int) -> LayerSums:
        """Sums over no tokens: all zero."""
        experts = spec.experts_of(layer)
        return cls(
            np.zeros((experts.count, spec.hidden)),
            np.zeros((experts.count, experts.intermediate)),
            np.zeros(experts.count, np.int64),
        )

    def add(self, expert: int, hidden: Array, intermediate: Array) -> None:
        """Inputs of an expert: [tokens, hidden] and [tokens, intermediate]."""
        self.hidden[expert] += np.square(hidden, dtype=np.float64).sum(axis=0)
        self.intermediate[expert] += np.square(intermediate, dtype=np.float64).sum(axis=0)
        self.tokens[expert] += len(hidden)

    def means(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """E[x^2] of both; zero for experts without tokens."""
        count = np.maximum(self.tokens, 1)[:, None]
        return (self.hidden / count).astype(np.float32), (self.intermediate / count).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Importance:
    """What a text gave. layers: by number, those with experts. provenance: attributes of the file."""

    layers: Mapping[int, LayerSums]
    provenance: Mapping[str, str | int]

    @property
    def num_unreached(self) -> int:
        """Experts of all layers that no token was routed to: their features will all count alike."""
        return sum(int((layer.tokens == 0).sum()) for layer in self.layers.values())

    def to_bytes(self) -> bytes:
        """The file. The same sums give the same bytes."""
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.attrs["kind"], file.attrs["format"] = KIND, FORMAT
            for name, value in self.provenance.items():
                file.attrs[name] = value
            for index, layer in self.layers.items():
                hidden, intermediate = layer.means()
                group = file.create_group(f"layers/{index}")
                group.create_dataset("hidden", data=hidden)
                group.create_dataset("intermediate", data=intermediate)
                group.create_dataset("tokens", data=layer.tokens)
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes the file, which appears complete or not at all and replaces an older one. ResourceError."""
        data = self.to_bytes()
        with AtomicFile(path) as file:
            file.write(data, 0)
            file.commit()


def collect(
    bundle: Bundle,
    text: str,
    *,
    context: int = 2048,
    max_tokens: int | None = None,
    tier: str | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Runs a text through the float32 reference, in windows of ``context`` tokens that do not overlap.

    tier: whose experts are run, None = ``cpu`` if the bundle has it (its 8 bits are nearer to the original).
    context: at most the model's own. progress: called with the number of layers that have been done since its
    last call. Raises UsageError for a text without tokens, UnsupportedModelError for a bundle without a
    tokenizer, MismatchError or FormatError for one without that tier.
    """
    tier = tier or ("cpu" if "cpu" in bundle.manifest.layouts else "gpu")
    tokens = TextAssets(bundle).tokenizer.encode(text)[:max_tokens]
    if not tokens:
        raise UsageError("the text is empty: there is nothing to calibrate on")
    settings = EngineSettings(
        context=min(context, bundle.spec.max_context),
        activations="float32",
        experts=tier,
        kv_dtype="f32",
        prefault=False,
    )
    sums = {layer: LayerSums.zero(bundle.spec, layer) for layer in bundle.spec.expert_layers}
    backend = FloatBackend(load_weights(bundle, tier), settings)
    done = 0

    def reach(layer: int) -> None:
        nonlocal done
        if progress is not None and layer > done:
            progress(layer - done)
        done = layer

    def observe(layer: int, expert: int, hidden: Array, intermediate: Array) -> None:
        reach(layer)
        sums[layer].add(expert, hidden, intermediate)

    try:
        backend.observe_experts(_windows(tokens, backend.capacity), observe)
    finally:
        backend.close()
    reach(len(bundle.spec.layers))
    return Importance(sums, _provenance(bundle, text, len(tokens), backend.capacity, tier))


def _windows(tokens: Sequence[int], context: int) -> list[npt.NDArray[np.int64]]:
    return [np.array(tokens[i : i + context], dtype=np.int64) for i in range(0, len(tokens), context)]


def _provenance(bundle: Bundle, text: str, num_tokens: int, context: int, tier: str) -> dict[str, str | int]:
    manifest = bundle.manifest
    return {
        "tool_version": tool_version(),
        "bundle": bundle.path.name,
        "bundle_digest": xxhash.xxh3_128_hexdigest(manifest.to_bytes()),
        "model_type": manifest.spec.family,
        "experts": f"{tier}: {manifest.layouts[tier]}",
        "text_digest": xxhash.xxh3_128_hexdigest(text.encode()),
        "text_bytes": len(text.encode()),
        "num_tokens": num_tokens,
        "context": context,
    }
