"""The same decoder in float32 on dequantised weights, in NumPy: slow, for measuring what quantisation costs.

It runs any tier: the CPU's tiles, or the Marlin experts that a GPU would run. Weights are unpacked when they
are used and kept while a bounded cache has room.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.layouts import Int8RowsLayout
from krasis.runtime import reference
from krasis.runtime.backend import KvRows, LayerProgress, Logits, TokenIds
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.rope import RopeTables
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights, ModelWeights, to_float32
from krasis.runtime.settings import EngineSettings
from krasis.runtime.state.kv_cache import KvCache

FloatArray = npt.NDArray[np.float32]
# Called with layer, expert, what gate and up multiply [tokens, hidden], what down multiplies [tokens, I].
LayerObserver = Callable[[int, int, Array, Array], None]
CACHE_BYTES = 2**30
TOKENS_AT_ONCE = 4096


class FloatBackend:
    """See ``backend.Backend``."""

    def __init__(self, weights: ModelWeights, settings: EngineSettings) -> None:
        self._architecture = weights.architecture
        self.layer_done: LayerProgress | None = None
        self.capacity = settings.context_for(self._architecture.max_context)
        self.prefill_chunk = settings.cpu_chunk_for(self.capacity)
        self._weights: ModelWeights | None = weights
        self._unpacked = UnpackedCache(CACHE_BYTES)
        self.kv_dtype, self.placement = settings.kv_dtype, ("NumPy", "NumPy")
        self._cache = KvCache(self._architecture, self.capacity, settings.kv_dtype)
        self._rope = RopeTables(self._architecture, self.capacity)
        self.description = (
            f"NumPy float32 reference, {weights.expert_layout.layout_id} experts of the {settings.experts} "
            f"tier, {settings.kv_dtype} KV cache of {self.capacity} tokens"
        )

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """See ``backend.Backend``."""
        weights = self._live_weights()
        hidden = weights.embedding.rows(tokens)
        for index, layer in enumerate(weights.layers):
            hidden += self._attend(index, layer, hidden, start)
            hidden += self._run_experts(index, layer, hidden)
            if self.layer_done is not None:
                self.layer_done(index + 1, len(weights.layers))
        rows = hidden if want_all else hidden[-1:]
        normed = reference.rms_norm(rows, weights.final_norm, self._architecture.rms_norm_eps)
        head = self._dense("lm_head", weights.lm_head)
        return reference.gemm(normed, head)[:, : self._architecture.vocab_size]

    def decode(self, token: int, position: int) -> Logits:
        """See ``backend.Backend``."""
        logits: Logits = self.prefill(np.array([token]), position, False)[0]
        return logits

    def observe_experts(self, windows: Sequence[TokenIds], observe: LayerObserver) -> None:
        """Runs texts of at most ``capacity`` tokens, each from an empty context, and shows what experts get.

        All windows pass a layer before the next: weights are unpacked once for many tokens. observe: called
        with the layer and what ``reference.ExpertObserver`` gets, several times for an expert. Keys and
        values held before are lost.
        """
        hidden = [self._live_weights().embedding.rows(tokens) for tokens in windows]
        for index, layer in enumerate(self._live_weights().layers):
            see = functools.partial(observe, index)
            for group in _groups(hidden, TOKENS_AT_ONCE):
                for rows in group:
                    np.add(rows, self._attend(index, layer, rows, 0), out=rows)
                added = self._run_experts(index, layer, np.concatenate(group), see)
                ends = np.cumsum([len(rows) for rows in group])[:-1]
                for rows, part in zip(group, np.split(added, ends), strict=True):
                    np.add(rows, part, out=rows)

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """See ``backend.Backend``."""
        return self._cache.read(layer, num_tokens)

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """See ``backend.Backend``."""
        self._cache.write(layer, keys, values)

    def close(self) -> None:
        """See ``backend.Backend``."""
        self._weights = None
        self._unpacked.clear()

    def _attend(self, index: int, layer: LayerWeights, hidden: FloatArray, start: int) -> FloatArray:
        """output(attention(norm(hidden))), [T, hidden_size]."""
        a = self._architecture
        end = start + len(hidden)
        self._rope.ensure(end)
        normed = reference.rms_norm(hidden, layer.attention_norm, a.rms_norm_eps)
        qkv = reference.gemm(normed, self._dense((index, "qkv"), layer.qkv))
        q, k, v = reference.qk_norm_rope(
            qkv,
            a.num_heads,
            a.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            a.rms_norm_eps,
            self._rope.cos[start:end],
            self._rope.sin[start:end],
        )
        keys, values = self._cache.keys[index], self._cache.values[index]
        keys[:, start:end], values[:, start:end] = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        attended = reference.attention(q, keys, values, start, a.head_dim**-0.5)
        output = self._dense((index, "output"), layer.output)
        return reference.gemm(attended.reshape(len(hidden), a.attention_size), output)

    def _run_experts(
        self,
        index: int,
        layer: LayerWeights,
        hidden: FloatArray,
        observe: reference.ExpertObserver | None = None,
    ) -> FloatArray:
        """The routed experts of norm(hidden), [T, hidden_size]."""
        a = self._architecture
        normed = reference.rms_norm(hidden, layer.experts_norm, a.rms_norm_eps)
        logits = reference.gemm(normed, to_float32(layer.router.data, layer.router.dtype))
        ids, weights = reference.route_topk(logits, a.num_experts_per_token, a.norm_topk_prob)
        layout = self._live_weights().expert_layout

        def unpack(number: int) -> tuple[Array, ...]:
            return layout.unpack_expert(layer.experts[number], a.hidden_size, a.expert_intermediate_size)

        def expert(number: int) -> tuple[Array, Array, Array]:
            gate, up, down = self._unpacked.get((index, number), lambda: unpack(number))
            return gate, up, down

        return reference.moe(normed, ids, weights, expert, observe)

    def _dense(self, key: Hashable, weight: Int8Weight) -> FloatArray:
        """[n, k] of an INT8 weight."""
        return self._unpacked.get(key, lambda: (Int8RowsLayout().unpack(weight.codes, weight.scales),))[0]

    def _live_weights(self) -> ModelWeights:
        if self._weights is None:
            raise NativeError("the engine is closed")
        return self._weights


class UnpackedCache:
    """Unpacked weights by key, the least recently used given up beyond limit_bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._held: OrderedDict[Hashable, tuple[Array, ...]] = OrderedDict()

    def get(self, key: Hashable, unpack: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
        """What unpack gave for the key, now or before."""
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = unpack()
            self._num_bytes += _num_bytes(found)
            while self._num_bytes > self._limit_bytes and len(self._held) > 1:
                self._num_bytes -= _num_bytes(self._held.popitem(last=False)[1])
        else:
            self._held.move_to_end(key)
        return found

    def clear(self) -> None:
        """Gives everything up."""
        self._held.clear()
        self._num_bytes = 0


def _groups(windows: Sequence[FloatArray], most_rows: int) -> Iterator[list[FloatArray]]:
    """Windows in order, together of at most most_rows rows, but at least one."""
    group: list[FloatArray] = []
    for rows in windows:
        if group and sum(map(len, group)) + len(rows) > most_rows:
            yield group
            group = []
        group.append(rows)
    if group:
        yield group


def _num_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in arrays)
