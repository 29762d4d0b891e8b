"""Both backends against transformers in float32 on the same dequantised weights; chunks, truncation,
bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from krasis.formats.architecture import Architecture
from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.layouts import CpuTileLayout, MarlinLayout
from krasis.runtime.backend import Backend
from krasis.runtime.batch import WantedLogits, one_sequence
from krasis.runtime.cpu.backend import CpuBackend
from krasis.runtime.cpu.float_backend import FloatBackend
from krasis.runtime.cpu.float_blocks import UnpackedCache
from krasis.runtime.cpu.weights import ModelWeights
from krasis.runtime.settings import EngineSettings

MakeWeights = Callable[..., ModelWeights]
Logits = Callable[[ModelWeights, list[int]], np.ndarray]
RelativeError = Callable[[np.ndarray, np.ndarray], float]
NUM_TOKENS = 75


@pytest.fixture(scope="module")
def tokens(shape: Architecture) -> list[int]:
    return np.random.default_rng(3).integers(0, shape.vocab_size, NUM_TOKENS).tolist()


@pytest.fixture(scope="module", params=["q8", "i4"])
def weights(request: pytest.FixtureRequest, shape: Architecture, make_weights: MakeWeights) -> ModelWeights:
    return make_weights(shape, CpuTileLayout(request.param))


@pytest.fixture(scope="module")
def expected(weights: ModelWeights, tokens: list[int], reference_logits: Logits) -> np.ndarray:
    return reference_logits(weights, tokens)


def open_backend(weights: ModelWeights, **changes: object) -> Backend:
    settings = EngineSettings(**{"threads": 2, "context": 128, "kv_dtype": "f32", **changes})
    backend = (CpuBackend if settings.activations == "int8" else FloatBackend)(weights, settings)
    assert backend.state.open() == 0
    return backend


def compute(backend: Backend, tokens: list[int], start: int, logits: WantedLogits = "last") -> np.ndarray:
    """The wanted logits of tokens from position start on."""
    return backend.run(one_sequence(np.array(tokens), start, logits)).copy()


def prefill(backend: Backend, tokens: list[int], chunks: list[int] | None = None) -> np.ndarray:
    """All logits, the tokens given in chunks of these sizes."""
    out, start = [], 0
    for size in chunks or [len(tokens)]:
        out.append(compute(backend, tokens[start : start + size], start, "all"))
        start += size
    return np.concatenate(out)


@pytest.mark.parametrize(("kv_dtype", "isa"), [("f32", "auto"), ("f16", "auto"), ("f32", "avx2")])
def test_int8_prefill_and_decode_equal_transformers(
    weights: ModelWeights,
    tokens: list[int],
    expected: np.ndarray,
    relative_error: RelativeError,
    kv_dtype: str,
    isa: str,
) -> None:
    backend = open_backend(weights, kv_dtype=kv_dtype, isa=isa)
    assert relative_error(prefill(backend, tokens), expected) <= 2e-2
    one_by_one = np.concatenate([compute(backend, [token], at) for at, token in enumerate(tokens)])
    assert relative_error(one_by_one, expected) <= 2e-2
    backend.close()


def test_float_prefill_and_decode_equal_transformers(
    weights: ModelWeights, tokens: list[int], expected: np.ndarray, relative_error: RelativeError
) -> None:
    backend = open_backend(weights, activations="float32")
    assert relative_error(prefill(backend, tokens), expected) <= 1e-4
    one_by_one = np.concatenate([compute(backend, [token], at) for at, token in enumerate(tokens)])
    assert relative_error(one_by_one, expected) <= 1e-4
    backend.close()


@pytest.mark.parametrize("layout", [MarlinLayout(4, 64, "BF16"), MarlinLayout(8, None, "F16")])
def test_marlin_experts_run_in_float(
    layout: MarlinLayout,
    shape: Architecture,
    tokens: list[int],
    make_weights: MakeWeights,
    reference_logits: Logits,
    relative_error: RelativeError,
) -> None:
    weights = make_weights(shape, layout)
    backend = open_backend(weights, activations="float32", experts="gpu")
    assert relative_error(prefill(backend, tokens), reference_logits(weights, tokens)) <= 1e-4
    with pytest.raises(NativeError, match="CPU tiles"):
        open_backend(weights)


@pytest.mark.parametrize("chunks", [[74, 1], [1, 74], [16, 16, 16, 16, 11], [1] * 75, [7, 33, 35]])
def test_any_chunks_give_the_same_bits(weights: ModelWeights, tokens: list[int], chunks: list[int]) -> None:
    whole = open_backend(weights, kv_dtype="f16")
    parts = open_backend(weights, kv_dtype="f16", threads=1)
    np.testing.assert_array_equal(prefill(parts, tokens, chunks), prefill(whole, tokens))


def test_only_the_last_logits_are_the_last_of_all(weights: ModelWeights, tokens: list[int]) -> None:
    for activations in ("int8", "float32"):
        backend = open_backend(weights, activations=activations)
        everything = prefill(backend, tokens)
        last = compute(backend, tokens, 0)
        assert last.shape == (1, weights.architecture.vocab_size)
        np.testing.assert_allclose(last[0], everything[-1], rtol=1e-5, atol=1e-5)


def test_going_back_overwrites(weights: ModelWeights, tokens: list[int]) -> None:
    backend = open_backend(weights)
    expected = prefill(backend, tokens)[30:]
    prefill(backend, tokens[::-1])
    compute(backend, tokens[:30], 0)
    np.testing.assert_array_equal(compute(backend, tokens[30:], 30, "all"), expected)


def test_an_expert_left_out_is_an_error(weights: ModelWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend(weights)
    compute(backend, [1], 0)
    run = backend._kernels.moe
    with monkeypatch.context() as patched:
        patched.setattr("krasis.runtime.cpu.kernels.Kernels.moe", lambda self, *args: run(*args) - 1)
        with pytest.raises(NativeError, match="not every routed expert"):
            compute(backend, [1, 2], 0)
    program, _ = backend._program_of(1, chooses=False)
    program.num_pairs += 1
    with pytest.raises(NativeError, match="not every routed expert"):
        compute(backend, [1], 0)


def test_positions_beyond_the_slot_or_out_of_order_are_refused(weights: ModelWeights) -> None:
    backend = open_backend(weights)
    compute(backend, [1] * 128, 0)
    with pytest.raises(NativeError, match="beyond the slot"):
        compute(backend, [1], 128)
    backend.state.rewind(0, 5)
    with pytest.raises(NativeError, match="not computed in order"):
        compute(backend, [1], 6)


def test_a_closed_backend_refuses(weights: ModelWeights) -> None:
    for activations in ("int8", "float32"):
        backend = open_backend(weights, activations=activations)
        backend.close()
        backend.close()
        with pytest.raises(NativeError, match="closed"):
            compute(backend, [1], 0)


def test_a_context_beyond_memory_is_refused_before_it_is_taken(
    make_weights: MakeWeights, shape: Architecture
) -> None:
    weights = make_weights(shape)
    huge = replace(weights, spec=replace(weights.spec, max_positions=2**31))
    with pytest.raises(ResourceError, match="KV cache does not fit"):
        open_backend(huge, context=2**31 - 1)


def test_the_cache_of_unpacked_weights_is_bounded() -> None:
    cache = UnpackedCache(3000)
    calls: list[int] = []

    def unpacker(key: int) -> Callable[[], tuple[np.ndarray, ...]]:
        return lambda: (calls.append(key), (np.zeros(250, dtype=np.float32),))[1]

    for key in (1, 2, 3, 1, 4, 1, 2):
        cache.get(key, unpacker(key))
    # 1000 bytes each: 4 pushes out 2, the one not used for longest.
    assert calls == [1, 2, 3, 4, 2]
