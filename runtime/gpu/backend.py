"""A decoder whose prefill runs on a GPU, experts streamed from host memory; see
``runtime/backend.py``.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass

import numpy as np
import torch

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError, NativeError, OutOfDeviceMemoryError
from krasis.formats.process import stages
from krasis.runtime.backend import LayerProgress, Logits
from krasis.runtime.batch import Batch
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.abandoned import make_exchanges
from krasis.runtime.gpu.chunk import chunk_of, part_of
from krasis.runtime.gpu.decode import Next
from krasis.runtime.gpu.experts.paths import ExpertPath, PathChoice, PathModel
from krasis.runtime.gpu.experts.stage import ExpertStage
from krasis.runtime.gpu.hybrid_state import gpu_state
from krasis.runtime.gpu.kernels.head import Head
from krasis.runtime.gpu.memory import OUT_OF_MEMORY, half_batch, largest_workspace
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel, SingleRank
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower
from krasis.runtime.gpu.parts import CPU_STAGE_TOKENS, Parts, open_parts
from krasis.runtime.gpu.prefill import PrefillPass
from krasis.runtime.planning.sizes import sizes_of_bundle
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)

PATH_WORDS: dict[ExpertPath, str] = {
    "streamed": "GPU, streamed experts",
    "routed": "GPU, routed experts streamed",
    "cpu": "GPU, experts on the CPU",
}


@dataclass(frozen=True, slots=True)
class LastPrefill:
    """What the last prefill call did. num_passes: over the layers. num_groups, bytes_copied: of experts to
    the GPU.

    expected_s: by the cost model.
    """

    path: ExpertPath
    num_tokens: int
    num_passes: int
    num_groups: int
    bytes_copied: int
    expected_s: float


def _kv_words(kv_dtype: str) -> str:
    return "int8 KV cache" if kv_dtype == "int8" else "KV cache"


def _times(model: GpuModel) -> str:
    return f" for {model.cache.num_slots} sequences" if model.cache.num_slots > 1 else ""


class GpuBackend:
    """See ``backend.Backend`` and ``distributed.ranked.RankedBackend``.

    closes_device: with itself. compute_stream: everything but expert copies runs there. last_prefill: what
    the last prefill did.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: EngineSettings,
        device: Device,
        parallel: Parallel | None = None,
        *,
        closes_device: bool = False,
    ) -> None:
        self._alone = SingleRank(sizes_of_bundle(bundle.manifest).shape.num_experts)
        self._parallel = parallel or self._alone
        self._device, self._closes_device = device, closes_device
        self.layer_done: LayerProgress | None = None
        self._pass_slots: set[int] = set()  # of the pass under way
        self.spec = bundle.spec
        self._parts: Parts | None = None
        self._parts = open_parts(bundle, settings, device, self._parallel)
        try:
            self._open(self._parts, settings)
        except BaseException:
            self.close()
            raise

    def _open(self, parts: Parts, settings: EngineSettings) -> None:
        plan, model, parallel, alone = parts.plan, parts.model, self._parallel, self._alone
        self.capacity, self.kv_dtype = plan.workload.context, plan.workload.kv_dtype
        if settings.kv_dtype == "int8" and self.kv_dtype != "int8":
            logger.warning("--kv-dtype int8: a GPU keeps this model's latents in %s", self.kv_dtype)
        self.compute_stream: Stream = model.stream
        # Of all ranks together, and of this one without the others.
        self._passes = {
            is_alone: (PrefillPass(model, parts.blocks, ranks, parts.residency), Head(model, ranks))
            for is_alone, ranks in ((False, parallel), (True, alone))
        }
        self._workspace = parts.workspace
        self.prefill_chunk = parallel.agree(parts.workspace.max_tokens)
        self._paths = PathModel(plan.sizes, plan.hardware, parallel.num_ranks, parallel.num_experts)
        self.last_prefill: LastPrefill | None = None
        self.state = gpu_state(model.cache, model.stream, self.kv_dtype, model.history)
        decodes = parts.decoder.description if parts.decoder else "GPU, a prefill a token"
        self.placement = (PATH_WORDS["streamed"], decodes)
        self.description = (
            f"{self._device.description}, {model.weights.expert_layout.layout_id} experts from "
            f"{parts.store.method} memory in {plan.placement.num_groups} groups a layer, "
            f"{settings.gpu_dtype}, {self.prefill_chunk} tokens a pass, "
            f"{_kv_words(self.kv_dtype)} of {self.capacity} tokens{_times(model)}; "
            f"decode: {decodes}"
        )

    # ---- Backend ---------------------------------------------------------------------------------------

    def run(self, batch: Batch, alone: bool = False) -> Logits:
        """See ``backend.Backend``. One token of each of a few sequences is decoded; anything else is a
        prefill pass. With several ranks all of them must be told the same batch, except alone: then only
        this one computes (tokens to decode; short prompts, on the CPU's experts). Where memory runs out, it
        goes on from there with half the batch; with several ranks OutOfDeviceMemoryError is raised, once the
        others have come to the end of the pass, and ``shrink`` is theirs to call.
        """
        slots = {span.slot for span in batch.spans}
        if self._pass_slots and (self._pass_slots & slots or not self._decodes(batch)):
            raise NativeError("between the layers of a pass only other sequences' tokens can be decoded")
        self.state.begin(batch)
        self.state.touch(batch)
        alone = alone and self._parallel.num_ranks > 1
        if (alone or self._parallel.num_ranks == 1) and self._decodes(batch):
            logits = self._decode(batch)
        else:
            self._pass_slots = slots
            try:
                logits = self._prefill(batch, alone)
            finally:
                self._pass_slots = set()
        self.state.advance(batch.spans)
        return logits

    @property
    def decodes_between_layers(self) -> bool:
        """Whether ``layer_done`` may run a batch of other sequences' next tokens. With several ranks that is
        rank 0's."""
        decoder = self._live_parts().decoder
        return decoder is not None and decoder.decodes_alone

    @property
    def last_decode_split(self) -> dict[str, float] | None:
        """Seconds of the last decoded token, by what they went into; None if decode is a prefill."""
        decoder = self._live_parts().decoder
        return None if decoder is None else decoder.last_split

    @property
    def is_loading(self) -> bool:
        """Whether experts are still being pinned in host memory."""
        return self._parts is not None and self._parts.store.is_loading

    def load_progress(self) -> tuple[int, int]:
        """(bytes of experts ready to be copied, bytes of all)."""
        return self._live_parts().store.load_progress()

    def check(self) -> None:
        """Raises what the device says of itself, if an error has left it broken for this process."""
        self._device.synchronize()

    def close(self) -> None:
        """See ``backend.Backend``."""
        parts, self._parts = self._parts, None
        if parts is not None:
            try:
                self._device.synchronize()  # a copy may still read the store's memory
            finally:
                parts.closing.close()
                if self._closes_device:
                    self._device.close()

    @property
    def num_resident_experts(self) -> int:
        """Experts in VRAM now, of all layers."""
        return self._num_resident(self._live_parts())

    # ---- for DistributedBackend ------------------------------------------------------------------------

    @property
    def decode_ranks(self) -> RankLink | RankFollower | None:
        """This rank's part in decode by several; None if rank 0 decodes alone."""
        return self._live_parts().ranks

    @property
    def idle_memory(self) -> torch.Tensor:
        """Memory of the next pass, which nothing is kept in between two: as much on every rank."""
        return self._workspace.between_passes(self.prefill_chunk)

    def kv_layers(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) [num_kv_heads, capacity, head_dim] of each layer of a slot, and their scales."""
        return self._live_parts().model.cache.layers(slot)

    def state_layers(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What each layer of a slot overwrites with every token, in two halves [1, n, 1] of f32."""
        return self._live_parts().model.cache.state_halves(slot)

    def runs_alone(self, batch: Batch) -> bool:
        """Whether this rank decodes the batch, or computes so few tokens on the CPU's experts faster than
        all ranks do."""
        if self._decodes(batch):
            return True
        parts, num_tokens = self._live_parts(), len(batch.tokens)
        if not self._takes_cpu(parts, num_tokens, alone=True):
            return False
        resident, longest = self._num_resident(parts), max(span.start for span in batch.spans)
        copied = parts.streamed.num_copied(num_tokens)
        paths: tuple[ExpertPath, ...] = ("streamed", "routed", "cpu")
        loading_s = parts.store.load_report().remaining_s
        choice = self._paths.choose(num_tokens, longest, resident, paths, copied, loading_s)
        return choice.path == "cpu"

    # ---- one batch -------------------------------------------------------------------------------------

    def _decodes(self, batch: Batch) -> bool:
        """Whether it is one token of each sequence, and this rank has a decoder."""
        is_decode = all(span.rows == 1 and span.logits == "last" for span in batch.spans)
        return is_decode and self._live_parts().decoder is not None

    def _decode(self, batch: Batch) -> Logits:
        decoder = self._live_parts().decoder
        if decoder is None:
            raise NativeError("this rank does not decode", where="decode")
        tokens, most = batch.tokens.tolist(), decoder.max_rows
        rows = [Next(token, span.start, span.slot) for token, span in zip(tokens, batch.spans, strict=True)]
        if len(rows) <= most:
            return decoder.decode_rows(rows)
        # More than one call takes: a prefill pass instead would stream every expert.
        groups = [rows[begin : begin + most] for begin in range(0, len(rows), most)]
        return np.concatenate([decoder.decode_rows(group).copy() for group in groups])

    def _prefill(self, batch: Batch, alone: bool) -> Logits:
        """Passes over a batch, several where it is longer than the workspace."""
        parts, num_tokens = self._live_parts(), len(batch.tokens)
        longest = max(span.start for span in batch.spans)
        stage, choice = self._choose(parts, num_tokens, longest, alone)
        logger.debug("prefill of %d tokens at %d: %s", num_tokens, longest, choice)
        pipeline = parts.streamed.pipeline
        num_groups, num_bytes = pipeline.num_copies, parts.streamed.num_bytes
        results: list[Logits] = []
        begin = num_passes = 0
        while begin < num_tokens:
            part = part_of(batch, begin, begin + self._workspace.max_tokens)
            words, logits = "", None
            try:
                with stages.stage(f"prefill of {len(part.tokens)} tokens"):
                    logits = self._run(part, stage, alone)
            except OUT_OF_MEMORY as error:
                if self._parallel.num_ranks > 1:
                    raise
                words = str(error)
            if logits is None:
                self.shrink(words)
                begin = self.state.row_after_abort(batch, begin)
                if begin == 0:
                    results, num_passes = [], 0
                continue
            begin, num_passes = begin + len(part.tokens), num_passes + 1
            if part.num_logits:
                results.append(logits)
        self.placement = (PATH_WORDS[choice.path], self.placement[1])
        self.last_prefill = LastPrefill(
            path=choice.path,
            num_tokens=num_tokens,
            num_passes=num_passes,
            num_groups=pipeline.num_copies - num_groups,
            bytes_copied=parts.streamed.num_bytes - num_bytes,
            expected_s=choice.expected_s[choice.path],
        )
        if not results:
            return np.empty((0, self.spec.vocab), np.float32)
        return results[0] if len(results) == 1 else np.concatenate(results)

    def _choose(
        self, parts: Parts, num_tokens: int, start: int, alone: bool
    ) -> tuple[ExpertStage, PathChoice]:
        """The stage that runs the experts of so many tokens, and why."""
        paths: tuple[ExpertPath, ...] = ("streamed", "routed")
        if alone:
            paths = ("cpu",)
        elif self._parallel.num_ranks == 1 and self._takes_cpu(parts, num_tokens, alone):
            paths = ("streamed", "routed", "cpu")
        resident, copied = self._num_resident(parts), parts.streamed.num_copied(num_tokens)
        loading_s = parts.store.load_report().remaining_s
        choice = self._paths.choose(num_tokens, start, resident, paths, copied, loading_s)
        if choice.path == "cpu":
            if parts.cpu is None:
                raise NativeError("this rank has no CPU experts", where="prefill")
            return parts.cpu, choice
        parts.streamed.routed_only = choice.path == "routed"
        parts.streamed.num_ahead = self._paths.num_ahead(num_tokens, start)
        return parts.streamed, choice

    def _takes_cpu(self, parts: Parts, num_tokens: int, alone: bool) -> bool:
        """Whether the CPU's experts can run so many tokens."""
        room = self._workspace.fits(num_tokens, 1) if alone else num_tokens <= self._workspace.max_tokens
        return parts.cpu is not None and num_tokens <= CPU_STAGE_TOKENS and room

    def _num_resident(self, parts: Parts) -> int:
        return 0 if parts.residency is None else parts.residency.num_resident

    def _run(self, batch: Batch, stage: ExpertStage, alone: bool) -> Logits:
        residency = self._live_parts().residency
        prefill, head = self._passes[alone]
        before, words = self._parallel.num_exchanges, ""
        buffers = self._workspace.view(len(batch.tokens), 1 if alone else None)
        try:
            chunk = prefill.run(batch, buffers, stage, self.layer_done)
            logits = head.of(batch, chunk, buffers)
            stage.check()
            if residency is not None:
                residency.update(self.compute_stream)
            return logits
        except OUT_OF_MEMORY as error:
            self._abort(stage)
            if alone or self._parallel.num_ranks == 1:
                raise
            words = str(error)
        except BaseException:
            self._abort(stage)
            raise
        # What the pass had allocated is gone by now, which a traceback would have kept.
        gc.collect()
        made = self._parallel.num_exchanges - before
        parts, chunk = self._live_parts(), chunk_of(batch, self._parallel)
        make_exchanges(parts.model, parts.blocks, self._parallel, chunk, buffers, made)
        raise OutOfDeviceMemoryError(words)

    def _abort(self, stage: ExpertStage) -> None:
        """After an error: what was submitted ends, and the next pass begins afresh."""
        try:
            self._device.synchronize()
        except (RuntimeError, KrasisError) as error:
            # The first error is the one raised; a device that is broken for good says so again at the next
            # call.
            logger.warning("the device reported an error while an aborted pass ended: %s", error)
        stage.abort()
        staging = self._live_parts().model.cache.staging
        if staging is not None:
            staging.abort()

    def shrink(self, words: str) -> None:
        """After running out of memory, on whichever rank: half the batch from now on, on all of them. words:
        of the error. Raises ResourceError if that was one token."""
        model, num_ranks, old = self._live_parts().model, self._parallel.num_ranks, self._workspace
        most = min(old.max_tokens, self.prefill_chunk)
        num_tokens = half_batch(self._device, model.spec, most, num_ranks, words)
        old.give_up()
        gc.collect()  # cycles of what was thrown may hold views of it
        self._workspace = largest_workspace(
            self._device, model.spec, model.dtype, num_tokens, num_ranks, old.exact_tokens
        )
        if num_ranks > 1:
            self.prefill_chunk = self._parallel.agree(self._workspace.max_tokens)

    def _live_parts(self) -> Parts:
        if self._parts is None:
            raise NativeError("the engine is closed")
        return self._parts
