"""krasis_short_conv against its formula in float64; calls, sequences, threads and instruction sets change no
bit."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Span
from krasis.runtime.cpu.delta_kernels import DeltaPlace
from krasis.runtime.cpu.short_conv import short_conv
from krasis.runtime.cpu.spans import SlotMemory, Spans

OFFSET = 64
SIZES = {"lfm2": (320, 3), "one block": (48, 8), "no past": (256, 1)}  # channels, width


def slot(channels: int, width: int) -> tuple[SlotMemory, DeltaPlace]:
    """Memory full of what must not be read before it is written."""
    end = OFFSET + 4 * channels * (width - 1)
    return SlotMemory(np.full(end // 4, np.nan, np.float32), np.zeros(4, np.float32)), DeltaPlace(
        0, OFFSET, end
    )


def run(kernels, x: np.ndarray, conv: np.ndarray, calls: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one sequence in calls of so many each, and the state after them."""
    width, channels = conv.shape
    memory, place = slot(channels, width)
    spans, out = Spans(2, place.end_bytes, 16), np.full((len(x), channels), np.nan, np.float32)
    for end, rows in zip(np.cumsum(calls), calls, strict=True):
        spans.set([Span(0, 0, rows, end - rows)], [memory])
        short_conv(kernels, x[end - rows : end].copy(), conv, spans, place, out[end - rows : end])
    return out, memory.keys[OFFSET // 4 :].reshape(width - 1, channels)


def make(rng, name: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    channels, width = SIZES[name]
    x = rng.standard_normal((rows, 3 * channels + 16)).astype(np.float32)  # a projection fills whole strips
    return x, rng.standard_normal((width, channels)).astype(np.float32)


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_formula(kernels, rng, name: str) -> None:
    x, conv = make(rng, name, 21)
    width, channels = conv.shape
    b, c, inner = (x[:, i * channels : (i + 1) * channels].astype(np.float64) for i in range(3))
    padded = np.concatenate([np.zeros((width - 1, channels)), b * inner])
    expected = np.stack([c[t] * (padded[t : t + width] * conv).sum(axis=0) for t in range(len(x))])
    found, columns = run(kernels, x, conv, [21])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(columns, padded[len(x) :], rtol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_calls_threads_and_instruction_sets_do_not_change_a_bit(
    make_kernels, isa: str, rng, name: str
) -> None:
    x, conv = make(rng, name, 12)
    expected = run(make_kernels("avx2", 1), x, conv, [12])
    for calls in ([12], [1] * 12, [1, 2, 9]):
        for found, wanted in zip(run(make_kernels(isa, 3), x, conv, calls), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_sequences_of_a_call_get_the_bits_of_their_own(kernels, rng) -> None:
    conv = make(rng, "lfm2", 0)[1]
    rows = [make(rng, "lfm2", count)[0] for count in (5, 1, 7)]
    alone = [run(kernels, one, conv, [len(one)])[0] for one in rows]
    made = [slot(*reversed(conv.shape)) for _ in rows]
    place = made[0][1]
    spans = Spans(4, place.end_bytes, 16)  # one is left over
    spans.set([Span(0, 0, 5, 0), Span(1, 5, 1, 0), Span(2, 6, 7, 0)], [memory for memory, _ in made])
    out = np.full((13, conv.shape[1]), np.nan, np.float32)
    short_conv(kernels, np.concatenate(rows), conv, spans, place, out)
    np.testing.assert_array_equal(out, np.concatenate(alone))


def test_refuses_what_it_cannot_compute(kernels) -> None:
    for channels, width in ((24, 3), (16, 9)):
        memory, place = slot(channels, width)
        spans = Spans(1, place.end_bytes, 16)
        spans.set([Span(0, 0, 2, 0)], [memory])
        x, conv, out = (np.zeros(shape, np.float32) for shape in ((2, 72), (width, channels), (2, channels)))
        with pytest.raises(NativeError, match="krasis_short_conv"):
            short_conv(kernels, x, conv, spans, place, out)
    memory, place = slot(32, 3)
    spans = Spans(1, place.end_bytes - 4, 16)
    spans.set([Span(0, 0, 2, 0)], [memory])
    conv, out = np.zeros((3, 32), np.float32), np.zeros((2, 32), np.float32)
    with pytest.raises(NativeError, match="outside of the slot's memory"):
        short_conv(kernels, np.zeros((2, 96), np.float32), conv, spans, place, out)
    with pytest.raises(NativeError, match="too few columns"):
        short_conv(kernels, np.zeros((2, 64), np.float32), conv, spans, place, out)
