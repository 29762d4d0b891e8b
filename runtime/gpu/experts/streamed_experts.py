"""The experts of prefill on the GPU, copied from host memory under the compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.experts.copies_ahead import CopiesAhead
from krasis.runtime.gpu.experts.copy_pipeline import CopyPipeline
from krasis.runtime.gpu.experts.habits import ExpertHabits
from krasis.runtime.gpu.experts.paths import AHEAD_SHARE
from krasis.runtime.gpu.experts.resident_views import ResidentViews
from krasis.runtime.gpu.experts.schedule import (
    Group,
    Mask,
    addresses,
    copies,
    layer_groups,
    num_copies,
    pass_groups,
)
from krasis.runtime.gpu.experts.stage import Residents, Step
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.host_memory.api import ExpertStore
from krasis.runtime.planning.shape import AnyModel, shape_of


@dataclass(frozen=True, slots=True)
class Streaming:
    """Where experts come from and go to. stream: of copies. staging uint8 [2, places, record_bytes], on the
    device.
    """

    store: ExpertStore
    stream: Stream
    staging: torch.Tensor
    residents: Residents | None = None


class StreamedExperts:
    """An ``ExpertStage``. It copies every expert that is not resident, or, if routed_only, those a layer's
    tokens chose: then the host must see the choice before their copies can begin, once a layer. Meanwhile
    num_ahead of those that will likely be chosen are copied.

    pipeline: its counters tell what was copied, but for what was ahead. ahead: of these. habits: what tokens
    chose so far.
    """

    def __init__(
        self,
        device: Device,
        model: AnyModel,
        product: ExpertProduct,
        streaming: Streaming,
        parallel: Parallel,
    ) -> None:
        a = shape_of(model)
        self._device = device
        self._product, self._streaming, self._parallel = product, streaming, parallel
        self._places = streaming.staging.shape[1]
        self.pipeline = CopyPipeline(streaming.stream, streaming.store, streaming.staging)
        self._room = self._places - self._places // AHEAD_SHARE  # of a buffer's places, for those chosen
        self.ahead = CopiesAhead(streaming.stream, streaming.store, streaming.staging[:, self._room :])
        shape = (a.num_expert_layers, a.num_experts)
        self._tables = device.empty(shape, torch.int64)
        self._host_tables = device.pinned(shape, torch.int64)
        self._host_counts = device.pinned(shape, torch.int32)
        self.habits = ExpertHabits(*shape, a.num_experts_per_token)
        self._counters = device.empty((2,), torch.int64)  # slots executed, slots there were
        self._host_counters = device.pinned((2,), torch.int64)
        self._residents = ResidentViews(streaming.residents, *shape)
        self._layers: tuple[tuple[Group, ...], ...] = ()
        self._planned_for: npt.NDArray[np.int64] | None = (
            None  # resident addresses that _layers and _tables fit
        )
        self._sequence = 0
        self._expected = self._num_tokens = 0
        self.routed_only = False
        self.num_ahead = 0
        self._copyable = self._may_be_copied()  # during a pass it is what it was at its beginning

    @property
    def num_bytes(self) -> int:
        """Copied since it was made."""
        return self.pipeline.num_bytes + self.ahead.num_bytes

    def num_copied(self, num_tokens: int) -> float | None:
        """Experts that so many tokens will likely choose in a layer and that must be copied; None if nothing
        is known."""
        return self.habits.num_chosen(num_tokens, self._may_be_copied())

    def begin(self, stream: Stream, num_tokens: int) -> None:
        """See ``ExpertStage``."""
        self._expected = self._sequence = 0
        self._num_tokens = num_tokens
        counters = self._counters

        def clear(_: int) -> None:
            counters.zero_()

        stream.launch("clear counters", clear, reads=(), writes=(counters,))
        if self.routed_only:
            self._copyable = self._may_be_copied()
            self.ahead.begin()
            self._send_ahead(0)
        else:
            self._plan_pass(stream)

    def run(self, stream: Stream, layer: int, step: Step) -> None:
        """See ``ExpertStage``."""
        rows = len(step.ids)
        self._expected += step.num_tokens * step.ids.shape[1]
        routing = step.buffers.routing.view(rows)
        self._product.align(stream, step, routing)
        self._count_slots(stream, routing.counts)
        stream.copy(self._host_counts[layer], routing.counts)
        self._residents.arrive(stream, layer)
        if self.routed_only:
            self._run_routed(stream, layer, step)
        else:
            memory = self._residents.of(layer)
            for group in self._layers[layer]:
                self._run_group(stream, layer, step, group, memory)
        self._product.reduce(stream, step)

    def end(self, stream: Stream) -> None:
        """See ``ExpertStage``."""
        self.pipeline.finish()
        stream.copy(self._host_counters, self._counters)

    def check(self) -> None:
        """See ``ExpertStage``."""
        self._device.host_reads(self._host_counters, self._host_counts)
        executed, routed = self._host_counters.tolist()
        # Of several ranks each counts the slots of its own experts; the sum over ranks is not known here.
        expected = self._expected if self._parallel.num_ranks == 1 else routed
        if executed != expected or routed != expected:
            raise NativeError(
                "not every routed expert was executed exactly once",
                where="prefill",
                got=f"{executed} executed, {routed} sorted",
                limit=expected,
            )
        self.habits.note(self._host_counts.numpy(), self._num_tokens)

    def abort(self) -> None:
        """See ``ExpertStage``."""
        self._planned_for = None
        self.pipeline.abort()
        self.ahead.begin()

    def _buffer_addresses(self) -> list[int]:
        return [buffer.data_ptr() for buffer in self._streaming.staging]

    def _plan_pass(self, stream: Stream) -> None:
        """The whole pass is known beforehand: the first copies are on their way before anything else is done,
        and all tables are sent at once, unless they are there from the pass before.
        """
        resident, p = self._residents.addresses, self._parallel
        is_known = self._planned_for is not None and np.array_equal(resident, self._planned_for)
        if not is_known:
            self._layers = pass_groups(p.first_expert, p.num_experts, resident == 0, self._places)
            self._planned_for = None
        self._announce(self._layers)
        self.pipeline.extend(copies(self._layers))
        if is_known:
            return
        self._device.host_writes(self._host_tables)
        tables = self._host_tables.numpy()
        for layer, groups in enumerate(self._layers):
            tables[layer] = self._table(groups, resident[layer])
        stream.copy(self._tables, self._host_tables)
        self._planned_for = resident.copy()

    def _run_routed(self, stream: Stream, layer: int, step: Step) -> None:
        """Waits for the layer's choice of experts, copies those that are neither resident nor there already,
        and computes; behind that it begins with the next layer's likely ones."""
        chosen = self._chosen(stream, layer)
        known = self._residents.addresses[layer]
        known, ahead = self.ahead.take(layer, known, chosen, stream)
        p = self._parallel
        copied = chosen & (known == 0)
        groups = layer_groups(layer, p.first_expert, p.num_experts, copied, self._room, self._sequence)
        self._sequence += num_copies(groups)
        self._send_table(stream, layer, groups, known)
        self._announce((groups,))
        self.pipeline.extend(copies((groups,)))
        memory = self._residents.of(layer) + ahead
        for group in groups:
            self._run_group(stream, layer, step, group, memory)
        self._send_ahead(layer + 1)

    def _chosen(self, stream: Stream, layer: int) -> Mask:
        """Which experts of the layer its tokens chose. Blocks the host."""
        stream.record().synchronize()
        counts = self._host_counts[layer]
        self._device.host_reads(counts)
        chosen: Mask = counts.numpy() > 0
        return chosen

    def _send_table(
        self, stream: Stream, layer: int, groups: tuple[Group, ...], known: npt.NDArray[np.int64]
    ) -> None:
        """A layer's addresses; before the layer's copies, which would take the link first."""
        table = self._host_tables[layer]
        self._planned_for = None
        self._device.host_writes(table)
        table.numpy()[:] = self._table(groups, known)
        stream.copy(self._tables[layer], table)

    def _send_ahead(self, layer: int) -> None:
        """Begins with the likely experts of a layer, if there is such a layer, and copies cost no reading."""
        store, count = self._streaming.store, min(self.num_ahead, self.ahead.room)
        if not count or layer == len(self._host_counts) or store.method == "ring":
            return
        ready, total = store.load_progress()
        if ready < total:
            return  # an expert that is not loaded yet would block the host
        experts = self.habits.likely(layer, self._copyable[layer], count, self._num_tokens)
        if experts.size:
            self.ahead.send(layer, experts)

    def _may_be_copied(self) -> Mask:
        """[layers, experts]: those of this rank that are not resident."""
        p = self._parallel
        own = np.zeros(self._residents.addresses.shape, bool)
        own[:, p.first_expert : p.first_expert + p.num_experts] = True
        own &= self._residents.addresses == 0
        return own

    def _announce(self, layers: tuple[tuple[Group, ...], ...]) -> None:
        runs = [(group.layer, run.first, run.count) for group in copies(layers) for run in group.runs]
        self._streaming.store.expect(runs)

    def _table(self, groups: tuple[Group, ...], resident: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return addresses(groups, self._buffer_addresses(), self._product.record_bytes, resident)

    def _run_group(
        self, stream: Stream, layer: int, step: Step, group: Group, known: Sequence[torch.Tensor]
    ) -> None:
        """known: memory of experts that are there already."""
        memory = list(known)
        if group.runs:
            self.pipeline.wait_for(group, stream)
            memory.append(self.pipeline.memory_of(group))
        if memory:
            table = self._tables[layer]
            self._product.run(stream, step, table, memory, group.begin, group.end, self._counters[:1], layer)
        if group.runs:
            self.pipeline.release(group, stream)

    def _count_slots(self, stream: Stream, counts: torch.Tensor) -> None:
        """Adds how many slots this rank's experts have in the layer, as they were sorted."""
        p, total = self._parallel, self._counters[1:]
        own = counts[p.first_expert : p.first_expert + p.num_experts]

        def add(_: int) -> None:
            total.add_(own.sum())

        stream.launch("count slots", add, reads=(own, total), writes=(total,))
