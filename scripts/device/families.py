"""A long prompt through layers of several families, all experts in RAM, against what the machine allows."""

from __future__ import annotations

import gc
import shutil
from typing import Any

from krasis.formats.bundle.reader import Bundle
from scripts.device import places, prefill, rates
from scripts.device.context import Context
from scripts.device.limits import streaming_vram_bytes

TIERS = ("gpu",)
GOAL_DELTA = 0.15
DELTA_KERNELS = ("delta", "short_conv")
"""Parts of the names of kernels that a recurrent layer alone has."""


def run(context: Context) -> dict[str, Any]:
    """time / max(bytes / pinned-copy rate, flops / matmul rate) of each family, and the share that the gated
    delta rule's kernels have of that time.
    """
    measured = rates.measure(context)
    num_tokens = context.sizes.prompt_tokens
    room = places.ram_bytes(context)
    rows = []
    for stack in context.sizes.families:
        num_layers = places.layers_within(context, stack, TIERS, room)
        path, made = places.ensure(context, places.ram_folder(context), stack, num_layers, TIERS)
        with Bundle.open(path) as bundle:
            positions = num_tokens + prefill.MORE_POSITIONS
            vram_bytes = streaming_vram_bytes(bundle, positions, context.device)
        one = prefill.run_once(context, path, vram_bytes, measured)
        delta_s = sum(kernel["ms"] for kernel in one["kernels"] if is_delta(kernel["name"])) / 1e3
        rows.append({"label": stack.label, **made, **one, "delta_share": delta_s / one["median_s"]})
        print(f"{stack.label}: time / limit {one['ratio']:.3f}", flush=True)
        gc.collect()  # a closed engine's cycles still map the bundle, whose memory would stay taken
        shutil.rmtree(path)
    return {"num_tokens": num_tokens, "goal": prefill.GOAL, "rates": measured, "rows": rows}


def is_delta(kernel: str) -> bool:
    """Whether it belongs to the gated delta rule or its convolution."""
    return any(part in kernel for part in DELTA_KERNELS)
