"""The CPU's part of a decoded token: a loop over the layers, through native calls resolved once."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Activation
from krasis.formats.native import Pool, check
from krasis.runtime.cpu.kernels import Acts, Kernels, moe_workspace_bytes, workspace
from krasis.runtime.cpu.native import prototype
from krasis.runtime.cpu.program import Program
from krasis.runtime.cpu.weights import FloatArray, ModelWeights, expert_biases
from krasis.runtime.device.api import Event
from krasis.runtime.gpu.experts.handover import NUM_RESULTS, Handover
from krasis.runtime.planning.shape import AnyModel, shape_of

# Idle threads of the pool spin for so long: more than the GPU needs between two layers' experts.
SPIN_S = 1e-3
PATIENCE_NS = 50_000_000  # before the host looks whether the GPU still lives


@dataclass(frozen=True, slots=True)
class HostLayer:
    """A layer's experts as the CPU has them. records uint8 [experts, record_bytes]; biases: of gate, up and
    down.
    """

    records: npt.NDArray[np.uint8]
    activation: Activation
    biases: tuple[FloatArray, FloatArray, FloatArray] | None


@dataclass(frozen=True, slots=True)
class CpuTier:
    """The CPU's copy of the experts (``load_weights(bundle, "cpu")``) and the threads that compute them."""

    weights: ModelWeights
    pool: Pool

    @property
    def tiles(self) -> str:
        """``q8`` or ``i4``. Raises NativeError for experts of another tier."""
        layout = self.weights.expert_layout
        tiles = layout.tiles
        if tiles is None:
            raise NativeError("the CPU kernels run CPU tiles only", got=layout.layout_id)
        return tiles

    def layers(self) -> list[HostLayer]:
        """Of each layer that has experts."""
        return [
            HostLayer(layer.experts, layer.layer.experts.activation, expert_biases(layer))
            for layer in self.weights.layers
            if layer.experts is not None and layer.layer.experts is not None
        ]


@dataclass(frozen=True, slots=True)
class _Layer:
    """ready, done: the flags. program: what is computed in between, into result."""

    name: str
    ready: torch.Tensor
    ready_address: int
    done: torch.Tensor
    done_address: int
    result: torch.Tensor
    result_address: int
    program: Program


class HostExperts:
    """num_executed: slots the last token's CPU experts made. waiting_s: of the last token, for the GPU."""

    def __init__(self, handover: Handover, tier: CpuTier, model: AnyModel, num_rows: int = 1) -> None:
        a = shape_of(model)
        self._handover, self._device, self._num_rows = handover, handover.device, num_rows
        self._inputs = tuple(
            tensor[:num_rows] for tensor in (handover.normed, handover.ids, handover.weights)
        )
        self._result_bytes = handover.results[0][:num_rows].nbytes
        tier.pool.set_spin(SPIN_S)
        acts = Acts.allocate(num_rows, a.expert_width)
        sizes = (a.expert_width, a.expert_intermediate_size, a.num_experts, a.num_experts_per_token)
        scratch = workspace(moe_workspace_bytes(num_rows, *sizes))
        normed, ids, weights = (tensor.numpy() for tensor in self._inputs)
        self._layers: list[_Layer] = []
        results = [result[:num_rows].numpy() for result in handover.results]
        for index, layer in enumerate(tier.layers()):
            program = Program(handover.name_of(index))
            run = Kernels(tier.pool, program)
            run.quantize(normed, acts)
            run.moe(
                layer.records, layer.records.shape[1], tier.tiles, acts, ids, weights,
                results[index % NUM_RESULTS], a.expert_intermediate_size, a.num_experts, scratch,
                layer.activation, layer.biases,
            )  # fmt: skip
            self._layers.append(self._layer(index, program))
        self._wait, self._store = prototype("krasis_wait_flag"), prototype("krasis_store_flag")
        self.waiting_s = 0.0

    def _layer(self, index: int, program: Program) -> _Layer:
        handover, name = self._handover, self._handover.name_of(index)
        ready, done = handover.host_flag(index), handover.device_flag(index)
        result = handover.results[index % NUM_RESULTS][: self._num_rows]
        return _Layer(
            name=name,
            ready=ready,
            ready_address=ready.data_ptr(),
            done=done,
            done_address=done.data_ptr(),
            result=result,
            result_address=result.data_ptr(),
            program=program,
        )

    @property
    def num_executed(self) -> int:
        """See the class."""
        return sum(layer.program.num_executed for layer in self._layers)

    def run(self, ended: Event) -> None:
        """Serves the token whose epoch ``handover.epoch`` holds. ended: after its graph.

        Raises NativeError if the GPU does not come. After an error nothing waits for this side any more.
        """
        try:
            self._serve(ended)
        except BaseException:
            self._handover.answer(self._handover.num_layers)
            raise

    def _serve(self, ended: Event) -> None:
        device, epoch = self._device, self._handover.epoch
        waited_ns = 0
        for layer in self._layers:
            device.host_writes(layer.result)
            ctypes.memset(layer.result_address, 0, self._result_bytes)
            began_ns = time.perf_counter_ns()
            if self._wait(layer.ready_address, epoch, PATIENCE_NS):
                self._wait_on(layer, ended)
            waited_ns += time.perf_counter_ns() - began_ns
            device.host_acquires(layer.ready)
            device.host_reads(*self._inputs)
            layer.program.run_some()
            device.host_releases(layer.done)
            self._store(layer.done_address, epoch)
        self.waiting_s = waited_ns * 1e-9

    def _wait_on(self, layer: _Layer, ended: Event) -> None:
        """Goes on waiting, unless the GPU has ended its work without a word, by an error for example.

        More patient than the GPU: of two sides that wait for each other, it gives up and names the layer.
        """
        deadline = time.monotonic() + 2e-9 * self._handover.timeout_ns
        status = 1
        while status and time.monotonic() < deadline:
            has_ended = ended.is_done()
            status = self._wait(layer.ready_address, self._handover.epoch, 0 if has_ended else PATIENCE_NS)
            if has_ended:
                break
        if status:
            check(status, f"{layer.name}: the CPU waits for the GPU")
