"""How long a context is when nobody says: the model's maximum, or what has room beside the weights."""

from __future__ import annotations

import bisect
import logging
from typing import TYPE_CHECKING

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.formats.models.drafting import draft_alone
from krasis.formats.models.state import SNAPSHOTS, copy_bytes, sequence_bytes
from krasis.formats.process.machine_limits import available_memory_bytes
from krasis.runtime.host.filesystem import weights_to_hold_bytes
from krasis.runtime.state.row_form import KV_NUMPY

if TYPE_CHECKING:
    from krasis.runtime.planning.sizes import ModelSizes

logger = logging.getLogger(__name__)

STEP_TOKENS = 1024
LEAST_TOKENS = 8192
"""The shortest default context, however short memory is: what then does not fit is refused with numbers."""
SHARE_OF_SPARE_RAM = 0.5
"""The cache's share of the RAM that the weights leave; the rest is for other programs."""
SHARE_OF_RAM = 1 / 16
"""The cache's share of all RAM where weights fill it, and are read from the disk in any case."""
SHARE_OF_VRAM = 0.2
"""More would displace experts, and so make every answer slower for the sake of prompts that seldom come."""


def tokens_in_ram(bundle: Bundle, tiers: tuple[str, ...], kv_dtype: str, *, drafts: bool = False) -> int:
    """Tokens whose keys and values RAM has room for beside the weights of those tiers. drafts: those of the
    bundle's layer for multi-token prediction are kept too."""
    available = available_memory_bytes()
    if available is None:
        return LEAST_TOKENS
    spare = available - weights_to_hold_bytes(bundle, tiers)
    room = max(SHARE_OF_SPARE_RAM * spare, SHARE_OF_RAM * available)
    spec, item_bytes = bundle.spec, np.dtype(KV_NUMPY[kv_dtype]).itemsize

    own = draft_alone(spec, bundle.manifest.spec.layers[-1]) if drafts else None

    def needed(tokens: int) -> int:
        kept = sequence_bytes(spec, tokens, item_bytes, "rings")
        kept += 0 if own is None else sequence_bytes(own, tokens, item_bytes, "rings")
        return kept + SNAPSHOTS * copy_bytes(spec, tokens, item_bytes)

    # One step more than the longest, which would else be cut to whole steps.
    fitting = bisect.bisect_right(range(spec.max_context + STEP_TOKENS + 1), room, key=needed) - 1
    return _at_least(fitting, spec.max_context, "RAM")


def tokens_in_vram(sizes: ModelSizes, vram_bytes: int, kv_dtype: str, num_gpus: int = 1) -> int:
    """Tokens whose keys and values have room on each of so many GPUs with that much memory beside the dense
    weights.
    """
    # The planner's modules take 50 ms to import: a start on the CPU does without.
    from krasis.runtime.planning import assumptions as assumed

    spare = vram_bytes - assumed.GPU_RESERVE_BYTES - sizes.dense_bytes
    room = min(SHARE_OF_VRAM * vram_bytes, SHARE_OF_SPARE_RAM * spare)
    return _at_least(sizes.tokens_within(room, kv_dtype, num_gpus), sizes.spec.max_context, "VRAM")


def _at_least(fitting: int, longest: int, memory: str) -> int:
    """In whole steps, and not less than ``LEAST_TOKENS``."""
    fitting = max(LEAST_TOKENS, fitting // STEP_TOKENS * STEP_TOKENS)
    if fitting < longest:
        logger.info("context: %d tokens of the model's %d have room in %s", fitting, longest, memory)
    return fitting
