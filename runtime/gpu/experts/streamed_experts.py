"""The experts of prefill on the GPU, copied from host memory under the compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.experts.copy_pipeline import CopyPipeline
from krasis.runtime.gpu.experts.resident_views import ResidentViews
from krasis.runtime.gpu.experts.schedule import (
    Group,
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
    tokens chose: then the host must see the choice before the copies can begin, once a layer.

    pipeline: its counters tell what was copied.
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
        self._group_experts = streaming.staging.shape[1]
        self.pipeline = CopyPipeline(streaming.stream, streaming.store, streaming.staging)
        shape = (a.num_expert_layers, a.num_experts)
        self._tables = device.empty(shape, torch.int64)
        self._host_tables = device.pinned(shape, torch.int64)
        self._host_counts = device.pinned((a.num_experts,), torch.int32)
        self._counters = device.empty((2,), torch.int64)  # slots executed, slots there were
        self._host_counters = device.pinned((2,), torch.int64)
        self._residents = ResidentViews(streaming.residents, *shape)
        self._layers: tuple[tuple[Group, ...], ...] = ()
        self._planned_for: npt.NDArray[np.int64] | None = (
            None  # resident addresses that _layers and _tables fit
        )
        self._sequence = 0
        self._expected = 0
        self.routed_only = False

    def begin(self, stream: Stream, num_tokens: int) -> None:
        """See ``ExpertStage``."""
        self._expected = self._sequence = 0
        counters = self._counters

        def clear(_: int) -> None:
            counters.zero_()

        stream.launch("clear counters", clear, reads=(), writes=(counters,))
        if not self.routed_only:
            self._plan_pass(stream)

    def run(self, stream: Stream, layer: int, step: Step) -> None:
        """See ``ExpertStage``."""
        rows = len(step.ids)
        self._expected += step.num_tokens * step.ids.shape[1]
        routing = step.buffers.routing.view(rows)
        self._product.align(stream, step, routing)
        self._count_slots(stream, routing.counts)
        groups = (
            self._routed_groups(stream, layer, routing.counts) if self.routed_only else self._layers[layer]
        )
        for group in groups:
            self._run_group(stream, layer, step, group)
        self._product.reduce(stream, step)

    def end(self, stream: Stream) -> None:
        """See ``ExpertStage``."""
        self.pipeline.finish()
        stream.copy(self._host_counters, self._counters)

    def check(self) -> None:
        """See ``ExpertStage``."""
        self._device.host_reads(self._host_counters)
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

    def abort(self) -> None:
        """See ``ExpertStage``."""
        self._planned_for = None
        self.pipeline.abort()

    def _buffer_addresses(self) -> list[int]:
        return [buffer.data_ptr() for buffer in self._streaming.staging]

    def _plan_pass(self, stream: Stream) -> None:
        """The whole pass is known beforehand: the first copies are on their way before anything else is done,
        and all tables are sent at once, unless they are there from the pass before.
        """
        resident, p = self._residents.addresses, self._parallel
        is_known = self._planned_for is not None and np.array_equal(resident, self._planned_for)
        if not is_known:
            self._layers = pass_groups(p.first_expert, p.num_experts, resident == 0, self._group_experts)
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

    def _routed_groups(self, stream: Stream, layer: int, counts: torch.Tensor) -> tuple[Group, ...]:
        """Waits for the layer's choice of experts, and begins to copy those that are not resident."""
        stream.copy(self._host_counts, counts)
        stream.record().synchronize()
        self._device.host_reads(self._host_counts)
        chosen = self._host_counts.numpy() > 0
        resident = self._residents.addresses[layer]
        p = self._parallel
        groups = layer_groups(
            layer,
            p.first_expert,
            p.num_experts,
            chosen & (resident == 0),
            self._group_experts,
            self._sequence,
        )
        self._sequence += num_copies(groups)
        self._announce((groups,))
        self.pipeline.extend(copies((groups,)))
        table = self._host_tables[layer]
        self._planned_for = None
        self._device.host_writes(table)
        table.numpy()[:] = self._table(groups, resident)
        stream.copy(self._tables[layer], table)
        return groups

    def _announce(self, layers: tuple[tuple[Group, ...], ...]) -> None:
        runs = [(group.layer, run.first, run.count) for group in copies(layers) for run in group.runs]
        self._streaming.store.expect(runs)

    def _table(self, groups: tuple[Group, ...], resident: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return addresses(groups, self._buffer_addresses(), self._product.record_bytes, resident)

    def _run_group(self, stream: Stream, layer: int, step: Step, group: Group) -> None:
        memory = self._residents.of(layer).copy()
        if group.runs:
            self.pipeline.wait_for(group, stream)
            memory.append(self.pipeline.memory_of(group))
        if memory:
            table = self._tables[layer]
            self._product.run(stream, step, table, memory, group.begin, group.end, self._counters[:1])
        if group.runs:
            self.pipeline.release(group, stream)

    def _count_slots(self, stream: Stream, counts: torch.Tensor) -> None:
        """Adds how many slots this rank's experts have in the layer, as they were sorted."""
        p, total = self._parallel, self._counters[1:]
        own = counts[p.first_expert : p.first_expert + p.num_experts]

        def add(_: int) -> None:
            total.add_(own.sum())

        stream.launch("count slots", add, reads=(own, total), writes=(total,))
