"""What is done about logits that are no numbers: what may be keys or values beyond F16 is tried in F32, once.

Some models have such values (65504 is the largest of F16); their text is right in a cache that holds them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from krasis.formats.errors import KrasisError, NativeError
from krasis.runtime.backend import Backend, Logits
from krasis.runtime.batch import one_sequence
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)

_VERIFY = "krasis-info --verify tells whether the bundle's files are as they were made"
_HINTS = {
    "f16": "the F16 KV cache may be too small for the model's values: use --kv-dtype f32 (on a GPU "
    f"--gpu-dtype bf16). Else the weights are damaged: {_VERIFY}",
    "f32": f"not for the KV cache, which is F32: the weights are damaged. {_VERIFY}; if so, the source was",
    "int8": f"not for the KV cache, whose scales are F32: the weights are damaged. {_VERIFY}",
    "bf16": f"the weights are damaged, or their values are beyond the GPU's: try --device cpu. {_VERIFY}",
}


def is_number(logits: Logits) -> bool:
    """Whether the logits [vocab] of a token are finite: the first is looked at, for one NaN or infinity in a
    layer reaches all of them.
    """
    return math.isfinite(logits[0])


def nonfinite_logits(kv_dtype: str) -> NativeError:
    """The error for logits that are no numbers, with the likeliest cause first."""
    return NativeError("the model produced NaN or infinite logits", hint=_HINTS[kv_dtype])


def usable(logits: Logits, backend: Backend) -> Logits:
    """The logits [vocab] themselves. Raises NativeError if they are no numbers."""
    if not is_number(logits):
        raise nonfinite_logits(backend.kv_dtype)
    return logits


def widened(
    backend: Backend,
    settings: EngineSettings,
    reopen: Callable[[EngineSettings], Backend],
    tokens: Sequence[int],
) -> tuple[Backend, EngineSettings] | None:
    """Another backend with an F32 cache that holds the tokens, and its settings; None if the cache is not F16
    or is a GPU's, or if memory does not suffice (the log says so). The given backend is left as it is.
    """
    from krasis.runtime.cpu.backend import CpuBackend
    from krasis.runtime.cpu.float_backend import FloatBackend

    if backend.kv_dtype != "f16" or not isinstance(backend, (CpuBackend, FloatBackend)):
        return None
    wider = replace(settings, kv_dtype="f32", context=backend.capacity)
    try:
        other = reopen(wider)
    except KrasisError as error:
        logger.warning("the F16 KV cache overflows, and one of F32 cannot be had: %s", error)
        return None
    logger.warning(
        "the model's keys or values exceed what an F16 KV cache holds: computing again with one of F32, as "
        "--kv-dtype f32 does from the start"
    )
    other.state.open()
    ids = np.asarray(tokens, dtype=np.int64)
    for begin in range(0, len(ids), other.prefill_chunk):
        other.run(one_sequence(ids[begin : begin + other.prefill_chunk], begin, "none"))
    return other, wider
