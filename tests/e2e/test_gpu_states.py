"""Short convolutions (LFM2), decays by channel (Kimi Linear), Mamba-2 in layers of one block (Nemotron-H),
residual streams and hashed tables (Qwen4) on the device's double: sequences of one batch, going back to a
copy of the state, and prefixes saved on either device. More in test_gpu_delta.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UnsupportedModelError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of, one_sequence
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.distributed.launch import backend_opener
from krasis.runtime.missing_kernels import refuse_ranks
from krasis.runtime.state.borders import TAIL_TOKENS
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
OpenGpu = Callable[..., Any]
TOKENS = np.random.default_rng(12).integers(0, 320, 60).tolist()
SUPER = "nemotron_h between projections"
LIMIT = 2e-3  # of f16: other numbers of rows are added up in another order


@pytest.fixture(scope="module", params=["lfm2_moe", "kimi_linear", "qwen4_exp", "nemotron_h", SUPER])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"indexer_budget": 128} if request.param == "qwen4_exp" else {}
    if request.param == "nemotron_h":
        changes = {"mamba_num_heads": 12}  # whose channels are a multiple of 64
    if request.param == SUPER:
        blocks = ["mamba", "moe", "attention", "mlp", "mamba", "moe"]
        changes = {"layers_block_type": blocks, "moe_latent_size": 64, "mamba_num_heads": 12}
    source = tiny(request.param.split()[0], folder / "hf", **changes)
    reporter, settings = Reporter(0), ConvertSettings(num_threads=1, gpu_group=64)
    convert(prepare([source], folder / "b.krasis", settings, reporter), reporter)
    return folder / "b.krasis"


@pytest.fixture
def open_states(bundle: Path, open_gpu: OpenGpu) -> OpenGpu:
    """open_states(**settings): an engine whose experts are all in VRAM."""
    return lambda **settings: open_gpu(bundle, **{"context": 128, "gpu_dtype": "f16"} | settings)


@pytest.fixture
def expected(open_states: OpenGpu) -> Callable[[list[int]], np.ndarray]:
    """Logits after some tokens, computed at once."""
    backend = open_states(seed=1)._backend
    return lambda tokens: backend.run(one_sequence(np.array(tokens), 0))[0].copy()


def test_goes_back_and_saves_what_it_keeps(
    open_states: OpenGpu,
    expected: Callable[[list[int]], np.ndarray],
    relative_error: RelativeError,
    tmp_path: Path,
) -> None:
    engine = open_states(seed=2)
    engine.prefill(TOKENS[:34])
    for count in (35, 36):  # the first is captured
        assert relative_error(engine.decode(TOKENS[count - 1]), expected(TOKENS[:count])) <= LIMIT
    border, other = 34 - TAIL_TOKENS, [*TOKENS[:32], 3, 4, 5]
    assert engine.keep_prefix(other) == border
    assert relative_error(engine.prefill(other[border:]), expected(other)) <= LIMIT
    engine.save_prefix(tmp_path / "a.kv")
    engine.prefill(TOKENS[:5])
    engine.load_prefix(tmp_path / "a.kv")
    assert list(engine.tokens) == other
    assert relative_error(engine.prefill(TOKENS[:3]), expected([*other, *TOKENS[:3]])) <= LIMIT


def test_a_prefix_saved_on_the_cpu_goes_on(
    bundle: Path,
    open_states: OpenGpu,
    expected: Callable[[list[int]], np.ndarray],
    relative_error: RelativeError,
    tmp_path: Path,
) -> None:
    settings = EngineSettings(context=128, threads=1, prefault=False, device="cpu", kv_dtype="f16")
    with Engine.open(bundle, settings) as saving:
        saving.prefill(TOKENS[:30])
        saving.save_prefix(tmp_path / "a.kv")
    engine = open_states(seed=3)
    engine.load_prefix(tmp_path / "a.kv")
    assert (
        relative_error(engine.prefill(TOKENS[30:33]), expected(TOKENS[:33])) <= 5e-2
    )  # of 8-bit activations


def test_sequences_of_one_batch_go_on_by_themselves(
    open_states: OpenGpu, expected: Callable[[list[int]], np.ndarray], relative_error: RelativeError
) -> None:
    """Prompts in one pass, then tokens together, and a token beside a prompt."""
    backend = open_states(seed=4, slots=2)._backend
    other = backend.state.open()
    held: dict[int, list[int]] = {0: [], other: []}
    for more in (
        {0: TOKENS[:20], other: TOKENS[20:22]},
        {other: [1], 0: [2]},
        {0: [3], other: TOKENS[40:47]},
    ):
        starts = {slot: len(held[slot]) for slot in more}
        found = backend.run(batch_of([(slot, starts[slot], tokens, "last") for slot, tokens in more.items()]))
        for row, (slot, tokens) in zip(found.copy(), more.items(), strict=True):
            held[slot] = held[slot] + tokens
            assert relative_error(row, expected(held[slot])) <= LIMIT


def test_what_is_planned_is_what_is_allocated(bundle: Path, open_gpu: OpenGpu, only_double: None) -> None:
    """And every launch names all it touches: the double hides the rest while it runs."""
    device = DeviceDouble(seed=1, total_bytes=2**30, paranoid=True)
    engine = open_gpu(bundle, device=device, context=64, gpu_dtype="f16")
    engine.prefill(TOKENS[:9])
    engine.decode(TOKENS[9])
    backend = engine._backend
    taken = backend._parts.model.cache.memory.nbytes + backend._parts.model.cache.copies.nbytes
    index_bytes = 64 * 32 * 2 if backend.spec.block_context else 0  # planned, but the GPU keeps no index
    assert abs(taken + index_bytes - backend._parts.plan.placement.kv_bytes) < 1024


def test_several_gpus_refuse_residual_streams_and_layers_of_one_block(bundle: Path, gpu_kind: str) -> None:
    settings = EngineSettings(device=gpu_kind, context=64)
    with Bundle.open(bundle) as opened:
        if opened.spec.residual is None and opened.spec.family != "nemotron_h":
            refuse_ranks(opened.spec, 2)
            return
        open_on_two = backend_opener(settings, 2)
        assert open_on_two is not None
        with pytest.raises(UnsupportedModelError, match="run on one GPU only"):
            open_on_two(opened, settings)
