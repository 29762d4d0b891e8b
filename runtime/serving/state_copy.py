"""Moves what a backend keeps of a sequence: from slot to slot, to RAM, and back."""

from __future__ import annotations

import numpy as np

from krasis.runtime.batch import StateStore
from krasis.runtime.serving.prefix_store import Layers
from krasis.runtime.state.kv_store import KeepsWindows, KvStore, import_layer


class StateCopier:
    """Copies all layers of one state store's slots."""

    def __init__(self, state: StateStore, num_layers: int) -> None:
        self._state, self._num_layers = state, num_layers
        # Of layers that overwrite what they keep; without any, till something else is seen.
        overwrites, has_windows = any(getattr(state, "recurrent", ())), getattr(state, "keeps_windows", False)
        self.cuts_anywhere = not overwrites and not has_windows
        # A copy of what a window overwrites has some positions before as well; or a pass makes a copy there.
        self.keeps_tails = has_windows if not overwrites else getattr(state, "copies_inside", False)

    def can_be_cut(self, slot: int) -> bool:
        """Whether what a slot holds can be gone on from at every position, as keys and values can. Once seen
        that it cannot, this holds for all."""
        length = self._state.length(slot)
        tried = {at for at in (length - 1, length - 2, length // 2) if at > 0}
        self.cuts_anywhere &= all(self._state.restorable(slot, at) == at for at in tried)
        return self.cuts_anywhere

    def num_bytes(self, slot: int, num_tokens: int) -> int:
        """What ``export`` will give: all layers are as large as the first, where all are alike."""
        if isinstance(self._state, KvStore | KeepsWindows):
            return self._state.exported_bytes(num_tokens)
        alike = self.cuts_anywhere
        counted = [
            self._state.export(slot, layer, num_tokens) for layer in range(1 if alike else self._num_layers)
        ]
        total = sum(keys.nbytes + values.nbytes for keys, values in counted)
        return total * self._num_layers if alike else total

    def export(self, slot: int, num_tokens: int) -> Layers:
        """Copies of the first positions of every layer."""
        layers = []
        for layer in range(self._num_layers):
            keys, values = self._state.export(slot, layer, num_tokens)
            layers.append((np.array(keys, order="C"), np.array(values, order="C")))
        return layers

    def import_(self, slot: int, layers: Layers, num_tokens: int, *, can_be_cut: bool) -> int:
        """Fills a slot with the first num_tokens positions; gives how many it then has: fewer, where only
        some positions can be gone on from."""
        for layer, (keys, values) in enumerate(layers):
            count = num_tokens if can_be_cut else keys.shape[1]
            import_layer(self._state, slot, layer, (keys[:, :count], values[:, :count]), num_tokens)
        return self.cut(slot, num_tokens)

    def copy(self, source: int, target: int, num_tokens: int) -> int:
        """Fills target with source's first positions, as ``import_``."""
        length = self._state.restorable(source, num_tokens)
        if not length:
            return self.cut(target, 0)
        for layer in range(self._num_layers):
            import_layer(self._state, target, layer, self._state.export(source, layer, length), length)
        return self.cut(target, length)

    def cut(self, slot: int, num_tokens: int) -> int:
        """Goes back to the largest position up to num_tokens that can be; gives it."""
        length = self._state.restorable(slot, num_tokens)
        if length != self._state.length(slot):
            self._state.rewind(slot, length)
        return length
