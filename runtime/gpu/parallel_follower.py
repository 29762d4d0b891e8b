"""The other ranks' side of decode over ranks: they compute the experts they hold of the rows that rank 0
sends, in a captured graph a token, and tell rank 0 between tokens which experts those are."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Graph
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.named_slots import COLUMNS, fits_named
from krasis.runtime.gpu.kernels.rank_rows import FlagWait, RoutedRows
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel_decode import clear_words
from krasis.runtime.gpu.parallel_memory import RankMemory

SPIN_S = 1e-3
"""Between two tokens rank 0's host needs about as long; looking all the time, this one begins at once."""
NAP_S, LONG_NAP_S, AWAKE_S = 1e-4, 2e-3, 0.5
"""Then it sleeps between looks, after AWAKE_S for longer: somebody is reading or typing."""


class RankFollower:
    """A rank's GPU in decode. timeout_s: how long it waits for rank 0 in a layer; rank 0's may wait for the
    CPU meanwhile. max_rows: tokens at once."""

    def __init__(
        self,
        model: GpuModel,
        product: ExpertProduct,
        memory: RankMemory,
        residency: Residency,
        timeout_s: float,
        *,
        rank: int,
        max_rows: int,
    ) -> None:
        """Raises OutOfDeviceMemoryError."""
        device = model.device
        self._model, self._product, self._memory, self._rank = model, product, memory, rank
        self._residency, self._timeout_ns = residency, int(timeout_s * 1e9)
        self._workspace = Workspace(device, model.spec, model.dtype, max_rows, 1, windows=False)
        self._epoch = device.empty((1,), torch.int64)
        self._host_epoch = device.pinned((1,), torch.int64)
        self._executed = device.empty((1,), torch.int64)
        self._arrivals = device.empty((model.shape.hidden_size // COLUMNS,), torch.int32)
        model.kernels.fill(model.stream, self._arrivals)
        self._fetched = device.flags(1)  # that nobody waits for
        self._timeouts = device.pinned((1,), torch.int64)
        clear_words(device, self._host_epoch, self._timeouts)
        self._graphs: dict[int, Graph] = {}
        self._told = -1  # the residency's table that rank 0 knows

    def follow(self, check: Callable[[], None]) -> None:
        """Computes tokens until rank 0 has no more. check: raises if the job has failed. Raises NativeError
        if rank 0's GPU did not come."""
        memory, stream = self._memory, self._model.stream
        self._residency.prepare(stream)
        self._residency.finish()  # the graph reads what is still on its way after opening
        token = int(memory.bell[0]) + 1
        while True:
            self._tell(token)
            self._await(token, check)
            num_rows = int(memory.num_rows[0])
            if num_rows == 0:
                return
            self._run(token, num_rows)
            check()
            self._residency.after_token(stream)
            token += 1

    def release(self) -> None:
        """See ``RankLink.release``."""
        self._memory.release()

    def close(self) -> None:
        """Waits for the GPU. Calling it again does nothing."""
        self._graphs.clear()
        self._model.stream.synchronize()

    # ---- one token -----------------------------------------------------------------------------------------

    def _tell(self, token: int) -> None:
        """Rank 0: which experts are here, and that the token may come."""
        memory, rank = self._memory, self._rank
        if self._residency.num_tables != self._told:
            self._told = self._residency.num_tables
            np.copyto(memory.held[rank].numpy(), self._residency.host_addresses != 0)
            memory.versions[rank] = self._told
        memory.set_flag(memory.ready(rank), token)

    def _await(self, token: int, check: Callable[[], None]) -> None:
        if self._memory.is_set(self._memory.bell, token, SPIN_S):
            return
        began = time.monotonic()
        while not self._memory.is_set(self._memory.bell, token):
            check()
            time.sleep(NAP_S if time.monotonic() - began < AWAKE_S else LONG_NAP_S)

    def _run(self, token: int, num_rows: int) -> None:
        device, stream = self._model.device, self._model.stream
        graph = self._graphs.get(num_rows)
        if graph is None:
            graph = self._graphs[num_rows] = self._capture(num_rows)
        device.host_writes(self._host_epoch)
        self._host_epoch[0] = token
        self._name_residents()
        graph.replay(stream)
        self._name_residents()
        stream.record().synchronize()
        device.host_reads(self._timeouts)
        if int(self._timeouts[0]):
            layer = self._model.shape.expert_layers[int(self._timeouts[0]) - 1]
            raise NativeError(
                "the GPU waited in vain for rank 0",
                where=f"layer {layer}",
                limit=f"{self._timeout_ns / 1e9:g} s",
            )

    def _name_residents(self) -> None:
        """See ``HybridDecoder``."""
        reads = self._residency.memory_in_use
        if reads:
            self._model.stream.launch("residents are read", lambda _: None, reads=reads, writes=())

    # ---- the graph -----------------------------------------------------------------------------------------

    def _capture(self, num_rows: int) -> Graph:
        """The graph of a token of so many sequences. It runs once before, with what the last token left:
        CUDA does not like to load kernels while it captures. Its flags say no more than they did."""
        stream = self._model.stream
        self._submit(num_rows)
        stream.synchronize()
        with self._model.device.capture(stream) as graph:
            self._submit(num_rows)
        return graph

    def _submit(self, num_rows: int) -> None:
        kernels, stream, executed = self._model.kernels, self._model.stream, self._executed

        def clear(_: int) -> None:
            executed.zero_()

        stream.launch("clear executed", clear, reads=(), writes=(executed,))
        kernels.fetch(stream, ((self._epoch, self._host_epoch),), self._fetched, executed)
        for layer in range(self._memory.num_layers):
            self._submit_layer(num_rows, layer)

    def _submit_layer(self, num_rows: int, layer: int) -> None:
        memory, model, residency = self._memory, self._model, self._residency
        kernels, stream, b = model.kernels, model.stream, self._workspace.view(num_rows)
        sent, flag, routing = memory.sent, memory.sent_flag(layer), b.routing.view(num_rows)
        # Of one row the sum is added to hidden, which begins at 0; of several it is written there.
        is_token = fits_named(routing)
        kernels.take(
            stream,
            FlagWait(flag, self._epoch, self._timeout_ns, self._timeouts, tag=layer + 1),
            RoutedRows(sent.rows[:num_rows], sent.ids[:num_rows], sent.weights[:num_rows]),
            residency.mask[layer],
            RoutedRows(b.x, b.ids, b.weights),
            residency.counts[layer],
            zeros=b.hidden if is_token else None,
        )
        step = Step(
            normed=b.normed, x=b.x, ids=b.ids, weights=b.weights, hidden=b.hidden, partial=b.hidden,
            buffers=b, num_tokens=num_rows,
        )  # fmt: skip
        table, num_experts = residency.table[layer], model.shape.num_experts
        if is_token:
            self._product.run_token(stream, step, table, self._executed, layer, self._arrivals)
        else:
            self._product.align(stream, step, routing)
            self._product.run(stream, step, table, (), 0, num_experts, self._executed, layer)
            self._product.reduce(stream, step)
        pieces = [(memory.results[self._rank, :num_rows], b.hidden)]
        if layer == memory.num_layers - 1:
            pieces.append((memory.executed[self._rank : self._rank + 1], self._executed))
        kernels.send(stream, pieces, memory.result_flag(self._rank, layer), self._epoch)
