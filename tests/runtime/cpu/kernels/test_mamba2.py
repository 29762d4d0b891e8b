"""krasis_mamba2 against its formulas in float64; calls, sequences, threads and instruction sets do not change
a bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import Mamba2
from krasis.runtime.batch import Span
from krasis.runtime.cpu.delta_kernels import DeltaPlace
from krasis.runtime.cpu.mamba_kernels import MambaWeights, mamba2
from krasis.runtime.cpu.spans import SlotMemory, Spans

MIXERS = {
    "nemotron": Mamba2(8, 64, 128, 2, 4),
    "one group, a least step": Mamba2(5, 16, 32, 1, 4, min_step=0.7),
    "no convolution, no bias": Mamba2(2, 32, 48, 2, 1, conv_bias=False),
    "a long one": Mamba2(4, 48, 16, 4, 8),
}
OFFSET = 192


@dataclass
class Case:
    """A layer with random weights, and rows of one sequence."""

    mixer: Mamba2
    x: np.ndarray
    steps: np.ndarray
    weights: MambaWeights

    @classmethod
    def make(cls, mixer: Mamba2, rng: np.random.Generator, rows: int) -> Case:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        heads, channels = mixer.heads, mixer.conv_channels
        weights = MambaWeights(
            conv=normal(mixer.conv_width, channels),
            conv_bias=normal(channels) if mixer.conv_bias else None,
            rates=np.exp(normal(heads) - 1),
            dt_bias=normal(heads),
            skip=normal(heads),
            gate_norm=1 + 0.2 * normal(mixer.inner),
            eps=1e-5,
        )
        wide = mixer.inner + channels + 16  # a projection is padded to whole strips
        return cls(mixer, normal(rows, wide), 2 * normal(rows, heads), weights)

    @property
    def place(self) -> DeltaPlace:
        columns = OFFSET + 4 * self.mixer.inner * self.mixer.state_dim
        end = columns + 4 * (self.mixer.conv_width - 1) * self.mixer.conv_channels
        return DeltaPlace(OFFSET, columns, end)

    def slot(self) -> SlotMemory:
        """Memory full of what must not be read before it is written."""
        return SlotMemory(np.full(self.place.end_bytes // 4, np.nan, np.float32), np.zeros(4, np.float32))

    def run(self, kernels, calls, slot: SlotMemory | None = None) -> np.ndarray:
        """The rows in calls of so many each."""
        slot = slot or self.slot()
        spans, out, start = Spans(2, self.place.end_bytes, 16), [], 0
        for rows in calls:
            spans.set([Span(0, 0, rows, start)], [slot])
            out.append(np.full((rows, self.mixer.inner), np.nan, np.float32))
            x, steps = (part[start : start + rows].copy() for part in (self.x, self.steps))
            mamba2(kernels, x, steps, self.mixer, self.weights, spans, self.place, out[-1])
            start += rows
        return np.concatenate(out)


def by_the_formulas(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, matrices [heads, state_dim, head_dim], the last rows before the convolution), token by token in
    float64."""
    mixer, weights = case.mixer, case.weights
    x, steps = case.x.astype(np.float64), case.steps.astype(np.float64)
    inner, size, dim = mixer.inner, mixer.state_dim, mixer.head_dim
    before = np.zeros((mixer.conv_width - 1, mixer.conv_channels))
    padded = np.concatenate([before, x[:, inner : inner + mixer.conv_channels]])
    state = np.zeros((mixer.heads, size, dim))
    out = []
    for t in range(len(x)):
        mixed = (padded[t : t + mixer.conv_width] * weights.conv).sum(axis=0)
        mixed += 0 if weights.conv_bias is None else weights.conv_bias
        mixed = mixed / (1 + np.exp(-mixed))
        of_token = []
        for head in range(mixer.heads):
            at = inner + head * mixer.groups // mixer.heads * size
            b, c = mixed[at:][:size], mixed[at + mixer.groups * size :][:size]
            own = mixed[head * dim :][:dim]
            step = max(np.logaddexp(0, steps[t, head] + weights.dt_bias[head]), mixer.min_step)
            state[head] = np.exp(-weights.rates[head] * step) * state[head] + np.outer(b, step * own)
            of_token.append(state[head].T @ c + weights.skip[head] * own)
        z = x[t, :inner]
        gated = (np.concatenate(of_token) * z / (1 + np.exp(-z))).reshape(mixer.groups, -1)
        normed = gated / np.sqrt((gated**2).mean(axis=1, keepdims=True) + weights.eps)
        out.append(normed.reshape(-1) * weights.gate_norm)
    return np.stack(out), state, padded[len(x) :]


@pytest.mark.parametrize("name", MIXERS)
def test_equals_the_formulas(kernels, rng, name: str) -> None:
    case = Case.make(MIXERS[name], rng, 50)
    slot = case.slot()
    found = case.run(kernels, [50], slot)
    expected, state, columns = by_the_formulas(case)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    memory, mixer = slot.keys[OFFSET // 4 :], case.mixer
    tiles = memory[: state.size].reshape(mixer.heads, -1, mixer.state_dim, 16)
    matrices = tiles.transpose(0, 2, 1, 3).reshape(state.shape)
    np.testing.assert_allclose(matrices, state, atol=1e-5 * np.abs(state).max())
    np.testing.assert_array_equal(memory[state.size :].reshape(columns.shape), columns.astype(np.float32))
    assert np.isnan(slot.keys[: OFFSET // 4]).all()


@pytest.mark.parametrize("name", MIXERS)
def test_calls_threads_and_instruction_sets_do_not_change_a_bit(
    make_kernels, isa: str, rng, name: str
) -> None:
    case = Case.make(MIXERS[name], rng, 23)
    expected = case.run(make_kernels("avx2", 1), [23])
    for calls in ([23], [1] * 23, [1, 2, 20]):
        np.testing.assert_array_equal(case.run(make_kernels(isa, 3), calls), expected)


def test_sequences_of_a_call_get_the_bits_of_their_own(kernels, rng) -> None:
    mixer = MIXERS["nemotron"]
    cases = [Case.make(mixer, rng, rows) for rows in (9, 1, 20)]
    for case in cases:
        case.weights = cases[0].weights
    alone = np.concatenate([case.run(kernels, [len(case.x)]) for case in cases])
    slots, place = [case.slot() for case in cases], cases[0].place
    cases[2].run(kernels, [5], slots[2])  # goes on from there
    x, steps = (
        np.concatenate([getattr(case, part)[skip:] for case, skip in zip(cases, (0, 0, 5), strict=True)])
        for part in ("x", "steps")
    )
    spans = Spans(4, place.end_bytes, 16)  # one is left over
    spans.set([Span(0, 0, 9, 0), Span(1, 9, 1, 0), Span(2, 10, 15, 5)], slots)
    out = np.full((25, alone.shape[1]), np.nan, np.float32)
    mamba2(kernels, x, steps, mixer, cases[0].weights, spans, place, out)
    np.testing.assert_array_equal(out, np.delete(alone, np.s_[10:15], axis=0))


def test_extreme_steps_give_numbers(kernels, rng) -> None:
    case = Case.make(MIXERS["a long one"], rng, 20)
    case.steps *= 200
    with np.errstate(over="ignore"):
        expected, _, _ = by_the_formulas(case)
    np.testing.assert_allclose(case.run(kernels, [20]), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("mixer", [Mamba2(1, 24, 16, 1, 4), Mamba2(1, 16, 8, 1, 4), Mamba2(1, 16, 16, 1, 9)])
def test_refuses_what_it_cannot_compute(kernels, rng, mixer: Mamba2) -> None:
    with pytest.raises(NativeError, match="krasis_mamba2"):
        Case.make(mixer, rng, 2).run(kernels, [2])


def test_refuses_memory_that_is_too_small(kernels, rng) -> None:
    case = Case.make(MIXERS["a long one"], rng, 2)
    spans = Spans(1, case.place.end_bytes - 4, 16)
    spans.set([Span(0, 0, 2, 0)], [case.slot()])
    out = np.zeros((2, case.mixer.inner), np.float32)
    with pytest.raises(NativeError, match="outside of the slot's memory"):
        mamba2(kernels, case.x, case.steps, case.mixer, case.weights, spans, case.place, out)
