"""What a block reads of the residual: its norm, or what was made of streams for it, normed or as it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.weights import LayerWeights

FloatArray = npt.NDArray[np.float32]


class BlockInput:
    """name: of the norm's weight, which layers between gated streams have none of."""

    def __init__(self, weights: LayerWeights, name: str, eps: float) -> None:
        self._weight, self._eps = weights.optional_vector(name), eps

    def read(
        self,
        kernels: Kernels,
        hidden: FloatArray,
        mixed: FloatArray | None,
        acts: Acts,
        normed: FloatArray | None = None,
    ) -> FloatArray:
        """acts, int8, of what the block reads; the same in float32, in normed where that is given and
        something is normed. mixed: what was made of streams, None where there are none.
        """
        if self._weight is None:
            if mixed is None:
                raise NativeError("the block has neither a norm nor streams", where="block")
            kernels.quantize(mixed, acts)
            return mixed
        source = hidden if mixed is None else mixed
        kernels.rms_norm(source, self._weight, self._eps, normed, acts)
        return source if normed is None else normed
