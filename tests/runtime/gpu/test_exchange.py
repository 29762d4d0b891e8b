"""On which stream ranks exchange rows: their order is the same on either, and what computes waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu.exchange import BESIDE_BYTES, RowExchange

TOKENS, HIDDEN, RANKS = 4096, 1024, 3


class Gathering:
    """A ``Parallel`` that writes what it would receive, and notes on which stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def gather_tokens(self, stream: Any, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        name = "x" if local.dtype == torch.float16 else "weights"
        self._gather(name, stream, local, full)

    def gather_ids(self, stream: Any, local: torch.Tensor, full: torch.Tensor, num_tokens: int) -> None:
        self._gather("ids", stream, local, full)

    def _gather(self, name: str, stream: Any, local: torch.Tensor, full: torch.Tensor) -> None:
        self.calls.append((name, stream.name))
        stream.launch(name, lambda _: full.fill_(local[0, 0]), reads=[local], writes=[full])


class Pass:
    """Rows of a rank on a double; num_rows: of its own."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.device = DeviceDouble(seed=seed)
        self.stream, self.beside = self.device.stream("compute"), self.device.stream("exchange")
        columns = {"x": (HIDDEN, torch.float16), "ids": (2, torch.int32), "weights": (2, torch.float32)}
        rows: dict[str, Any] = {"partial": None}
        for name, (width, dtype) in columns.items():
            rows[name] = self.device.empty((num_rows, width), dtype)
            rows[f"gathered_{name}"] = self.device.empty((num_rows * RANKS, width), dtype)
        self.buffers, self.parallel = SimpleNamespace(**rows), Gathering()
        self.exchange = RowExchange(self.stream, self.beside, self.parallel, self.buffers, num_rows * RANKS)

    def write(self, name: str, value: int) -> None:
        tensor = getattr(self.buffers, name)
        self.stream.launch(f"write {name}", lambda _: tensor.fill_(value), reads=[], writes=[tensor])

    def experts(self) -> list[float]:
        """Reads what was gathered, and overwrites what was sent: the double refuses what is not ordered."""
        found: list[float] = []
        full = [self.buffers.gathered_x, self.buffers.gathered_ids, self.buffers.gathered_weights]
        sent = [self.buffers.x, self.buffers.ids, self.buffers.weights]

        def action(_: int) -> None:
            found.extend(float(tensor[-1, -1]) for tensor in full)
            for tensor in sent:
                tensor.zero_()

        self.stream.launch("experts", action, reads=full, writes=sent)
        self.stream.synchronize()
        return found


LONG = -(-BESIDE_BYTES // (2 * HIDDEN * (RANKS - 1)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_rows", "where"), [(LONG, "exchange"), (LONG - 1, "compute")])
def test_x_goes_ahead_of_many_rows(num_rows: int, where: str, seed: int) -> None:
    one = Pass(num_rows, seed)
    for layer in (1, 2):
        one.write("x", 10 * layer)
        one.exchange.send_x()
        assert one.parallel.calls == ([("x", where)] if where == "exchange" else [])
        one.write("ids", 10 * layer + 1)
        one.write("weights", 10 * layer + 2)
        one.exchange.send_choice()
        one.exchange.gather()
        assert one.parallel.calls == [("x", where), ("weights", where), ("ids", where)]
        assert one.experts() == [10 * layer, 10 * layer + 1, 10 * layer + 2]
        one.parallel.calls.clear()


def test_a_choice_waits_for_its_x() -> None:
    """Experts with a norm of their own: x is there last. The order stays, for a rank that lacks memory makes
    what is left in it."""
    one = Pass(LONG)
    for name in ("ids", "weights"):
        one.write(name, 3)
    one.exchange.send_choice()
    one.write("x", 3)
    one.exchange.gather()
    assert one.parallel.calls == [("x", "compute"), ("weights", "compute"), ("ids", "compute")]
    assert one.experts() == [3, 3, 3]
