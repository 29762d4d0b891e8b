"""krasis_gated_delta and krasis_gate_rows against their formulas in float64; calls, sequences, threads and
instruction sets do not change a bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta
from krasis.runtime.batch import Span
from krasis.runtime.cpu.delta_kernels import DeltaPlace, DeltaWeights, gate_rows, gated_delta
from krasis.runtime.cpu.spans import SlotMemory, Spans

MIXERS = {
    "qwen3_next": GatedDelta(2, 4, 128, 128, 4),
    "one value head a key head": GatedDelta(3, 3, 32, 16, 4),
    "wide values": GatedDelta(1, 5, 16, 256, 2),
    "no convolution": GatedDelta(2, 2, 48, 32, 1),
    "a long one, and sigmoid": GatedDelta(2, 4, 64, 48, 8, "sigmoid"),
    "kimi_linear": ChannelDelta(3, 64, 4, 64, 64),
    "a lower bound": ChannelDelta(17, 16, 2, 16, 16, -5.0),
}
OFFSET = 192


@dataclass
class Case:
    """A layer with random weights, and rows of one sequence."""

    mixer: GatedDelta | ChannelDelta
    x: np.ndarray
    gates: np.ndarray
    weights: DeltaWeights
    decays: np.ndarray | None = None
    z: np.ndarray | None = None

    @classmethod
    def make(cls, mixer: GatedDelta | ChannelDelta, rng: np.random.Generator, rows: int) -> Case:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        heads = mixer.value_heads
        conv = normal(mixer.conv_width, mixer.conv_channels)
        rates = np.exp(normal(heads) - 1)
        by_channel = isinstance(mixer, ChannelDelta)
        biases = normal(heads * mixer.key_dim if by_channel else heads)
        weights = DeltaWeights(conv, rates, biases, 1 + 0.2 * normal(mixer.value_dim), 1e-6)
        if by_channel:
            gates, decays, z = 2 * normal(rows, heads), normal(rows, len(biases)), normal(rows, len(biases))
            return cls(mixer, normal(rows, mixer.conv_channels + 16), gates, weights, decays, z)
        wide = mixer.conv_channels + heads * mixer.value_dim + 16  # a projection is padded to whole strips
        return cls(mixer, normal(rows, wide), 2 * normal(rows, 2 * heads), weights)

    def beside(self, rows: slice) -> list[np.ndarray]:
        """Decays and z of some rows, if there are such."""
        return [part[rows].copy() for part in (self.decays, self.z) if part is not None]

    @property
    def place(self) -> DeltaPlace:
        mixer = self.mixer
        columns = OFFSET + 4 * mixer.value_heads * mixer.key_dim * mixer.value_dim
        return DeltaPlace(OFFSET, columns, columns + 4 * (mixer.conv_width - 1) * mixer.conv_channels)

    def slot(self) -> SlotMemory:
        """Memory full of what must not be read before it is written."""
        return SlotMemory(np.full(self.place.end_bytes // 4, np.nan, np.float32), np.zeros(4, np.float32))

    def run(self, kernels, calls, slot: SlotMemory | None = None) -> np.ndarray:
        """The rows in calls of so many each."""
        slot = slot or self.slot()
        spans, out, start = Spans(2, self.place.end_bytes, 16), [], 0
        for rows in calls:
            spans.set([Span(0, 0, rows, start)], [slot])
            out.append(np.full((rows, self.mixer.value_heads * self.mixer.value_dim), np.nan, np.float32))
            x, gates = (part[start : start + rows].copy() for part in (self.x, self.gates))
            beside = self.beside(slice(start, start + rows))
            gated_delta(kernels, x, gates, self.mixer, self.weights, spans, self.place, out[-1], *beside)
            start += rows
        return np.concatenate(out)


def by_the_formulas(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, matrices [heads, key_dim, value_dim], the last rows before the convolution), token by token in
    float64."""
    mixer, weights = case.mixer, case.weights
    x, gates = case.x.astype(np.float64), case.gates.astype(np.float64)
    channels, keys = mixer.conv_channels, mixer.key_heads * mixer.key_dim
    padded = np.concatenate([np.zeros((mixer.conv_width - 1, channels)), x[:, :channels]])
    state = np.zeros((mixer.value_heads, mixer.key_dim, mixer.value_dim))
    out = []
    for t in range(len(x)):
        mixed = (padded[t : t + mixer.conv_width] * weights.conv).sum(axis=0)
        mixed = mixed / (1 + np.exp(-mixed))
        of_token = []
        for head in range(mixer.value_heads):
            key_head = head * mixer.key_heads // mixer.value_heads
            q, k = (mixed[at + key_head * mixer.key_dim :][: mixer.key_dim] for at in (0, keys))
            q, k = (part / np.sqrt((part**2).sum() + 1e-6) for part in (q, k))
            v = mixed[2 * keys + head * mixer.value_dim :][: mixer.value_dim]
            b, matrix = gates[t, head], state[head]
            matrix *= decay_by_the_formulas(case, t, head)
            matrix += np.outer(k, (v - matrix.T @ k) / (1 + np.exp(-b)))
            o = matrix.T @ q / np.sqrt(mixer.key_dim)
            z = x[t, channels:] if case.z is None else case.z[t]
            z = z[head * mixer.value_dim :][: mixer.value_dim]
            gate = 1 / (1 + np.exp(-z)) * (z if mixer.gate == "silu" else 1)
            of_token.append(o / np.sqrt((o**2).mean() + weights.eps) * weights.gate_norm * gate)
        out.append(np.concatenate(of_token))
    return np.stack(out), state, padded[len(x) :]


def decay_by_the_formulas(case: Case, t: int, head: int) -> np.ndarray:
    """What stays of the rows of a head's matrix, [key_dim or 1, 1]."""
    mixer, weights = case.mixer, case.weights
    if isinstance(mixer, ChannelDelta):
        own = slice(head * mixer.dim, (head + 1) * mixer.dim)
        a = case.decays[t, own, None].astype(np.float64) + weights.dt_bias[own, None]
    else:
        a = case.gates[t, mixer.value_heads + head].astype(np.float64) + weights.dt_bias[head]
    if (bound := getattr(mixer, "lower_bound", None)) is not None:
        return np.exp(bound / (1 + np.exp(-weights.rates[head] * a)))
    return np.exp(-weights.rates[head] * np.log1p(np.exp(a)))


@pytest.mark.parametrize("name", MIXERS)
def test_equals_the_formulas(kernels, rng, name: str) -> None:
    case = Case.make(MIXERS[name], rng, 70)
    slot = case.slot()
    found = case.run(kernels, [70], slot)
    expected, state, columns = by_the_formulas(case)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    memory, mixer = slot.keys[OFFSET // 4 :], case.mixer
    tiles = memory[: state.size].reshape(mixer.value_heads, -1, mixer.key_dim, 16)
    matrices = tiles.transpose(0, 2, 1, 3).reshape(state.shape)
    np.testing.assert_allclose(matrices, state, atol=1e-5 * np.abs(state).max())
    np.testing.assert_array_equal(memory[state.size :].reshape(columns.shape), columns.astype(np.float32))
    assert np.isnan(slot.keys[: OFFSET // 4]).all()


@pytest.mark.parametrize("name", MIXERS)
def test_calls_threads_and_instruction_sets_do_not_change_a_bit(
    make_kernels, isa: str, rng, name: str
) -> None:
    case = Case.make(MIXERS[name], rng, 41)
    expected = case.run(make_kernels("avx2", 1), [41])
    for calls in ([41], [1] * 41, [1, 2, 3, 35], [17, 24]):
        np.testing.assert_array_equal(case.run(make_kernels(isa, 3), calls), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_sequences_of_a_call_get_the_bits_of_their_own(kernels, rng, name: str) -> None:
    mixer = MIXERS[name]
    cases = [Case.make(mixer, rng, rows) for rows in (9, 1, 20)]
    for case in cases:
        case.weights = cases[0].weights
    alone = np.concatenate([case.run(kernels, [len(case.x)]) for case in cases])
    slots, place = [case.slot() for case in cases], cases[0].place
    cases[2].run(kernels, [5], slots[2])  # goes on from there
    parts = ("x", "gates", "decays", "z") if cases[0].z is not None else ("x", "gates")
    x, gates, *beside = (
        np.concatenate([getattr(case, part)[skip:] for case, skip in zip(cases, (0, 0, 5), strict=True)])
        for part in parts
    )
    spans = Spans(4, place.end_bytes, 16)  # one is left over
    spans.set([Span(0, 0, 9, 0), Span(1, 9, 1, 0), Span(2, 10, 15, 5)], slots)
    out = np.full((25, alone.shape[1]), np.nan, np.float32)
    gated_delta(kernels, x, gates, mixer, cases[0].weights, spans, place, out, *beside)
    np.testing.assert_array_equal(out, np.delete(alone, np.s_[10:15], axis=0))


def test_extreme_gates_give_numbers(kernels, rng) -> None:
    case = Case.make(MIXERS["one value head a key head"], rng, 30)
    case.gates *= 1000
    case.x[3] = 0  # a token of length 0
    expected, _, _ = by_the_formulas_of_extremes(case)
    np.testing.assert_allclose(case.run(kernels, [30]), expected, atol=2e-4 * np.abs(expected).max())


def by_the_formulas_of_extremes(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        return by_the_formulas(case)


@pytest.mark.parametrize(
    "mixer", [GatedDelta(1, 1, 24, 16, 4), GatedDelta(1, 1, 16, 8, 4), GatedDelta(1, 1, 16, 16, 9)]
)
def test_refuses_what_it_cannot_compute(kernels, rng, mixer: GatedDelta) -> None:
    case = Case.make(mixer, rng, 2)
    with pytest.raises(NativeError, match="krasis_gated_delta"):
        case.run(kernels, [2])


def test_refuses_memory_that_is_too_small(kernels, rng) -> None:
    case = Case.make(MIXERS["no convolution"], rng, 2)
    spans = Spans(1, case.place.end_bytes - 4, 16)
    spans.set([Span(0, 0, 2, 0)], [case.slot()])
    out = np.zeros((2, 64), np.float32)
    with pytest.raises(NativeError, match="outside of the slot's memory"):
        gated_delta(kernels, case.x, case.gates, case.mixer, case.weights, spans, case.place, out)


@pytest.mark.parametrize("kind", ["sigmoid", "silu"])
def test_gates_of_rows(kernels, rng, kind: str) -> None:
    x, gates = (10 * rng.standard_normal((5, 48)).astype(np.float32) for _ in range(2))
    wide = gates.astype(np.float64)
    expected = x / (1 + np.exp(-wide)) * (wide if kind == "silu" else 1)
    gate_rows(kernels, x, gates, kind)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-30)
    with pytest.raises(NativeError):
        gate_rows(kernels, np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32))
