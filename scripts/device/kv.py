"""A long prompt and tokens after it, all experts in VRAM, with keys and values of 16 bits and of 8, and with
those of 8 in RAM.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from krasis.runtime.context_size import tokens_in_vram
from krasis.runtime.planning.sizes import sizes_of_bundle
from scripts.device import decode, places
from scripts.device.context import GIB, Context
from scripts.device.devices import open_engine
from scripts.device.prefill import prefill_s

LABEL = "30b"
NUM_TOKENS = {"real": 32_000, "tiny": 24}
ALL_LAYERS = 10_000
# --kv-dtype (a GPU's f16 is of --gpu-dtype), layers in RAM, whether the CPU has experts: of a card of 16 GiB.
KINDS = {
    "bf16": ("f16", 0, False),
    "int8": ("int8", 0, False),
    "int8 in RAM": ("int8", ALL_LAYERS, False),
    "int8, 16 GiB": ("int8", 0, True),
    "int8 in RAM, 16 GiB": ("int8", ALL_LAYERS, True),
}
CARD_BYTES = 16 * GIB

Record = dict[str, Any]


def run(context: Context) -> Record:
    """Of each: seconds of the prompt and of a token after it, bytes of a position, positions that a card of
    16 GiB would have room for by default; how far the logits of the prompt's end lie apart, and whether those
    of the prompt and its second half are the same with all in RAM.
    """
    path, made = places.bundle_in_ram(context, LABEL)
    prompt, rows, ends, halves = NUM_TOKENS[context.size], [], [], []
    for name, (kv_dtype, on_host, is_card) in KINDS.items():
        if is_card and context.size == "tiny":
            continue
        changes = {
            "kv_dtype": kv_dtype,
            "host_kv_layers": on_host,
            "vram_bytes": CARD_BYTES if is_card else None,
        }
        positions = prompt + context.sizes.decode_tokens + decode.WARM_UP + 1
        with open_engine(context, path, positions, **changes) as engine:
            ids = np.random.default_rng(7).integers(0, engine.architecture.vocab_size, prompt)
            seconds = [prefill_s(engine, ids) for _ in range(2 if context.size == "real" else 1)]
            engine.reset()
            ends.append(engine.prefill(ids).copy())
            engine.truncate(prompt // 2)
            halves.append(engine.prefill(ids[prompt // 2 :]).copy())
            engine.reset()
            after = decode.decode(context, engine, prompt)
            cache = engine._backend._live_parts().model.cache  # type: ignore[attr-defined]
            sizes = sizes_of_bundle(engine.bundle.manifest)
            row = {
                "kind": name,
                "prefill_s": min(seconds),
                "token_s": after["median_s"],
                "position_bytes": sum(part.row_bytes for part in cache.parts if part is not None),
                "card_tokens": tokens_in_vram(sizes, CARD_BYTES, name.split()[0].strip(",")),
            }
        print(row, flush=True)
        rows.append(row)
    apart = float(np.linalg.norm(ends[1] - ends[0]) / np.linalg.norm(ends[0]))
    print(f"int8 beside bf16: {apart:.2e} of the norm", flush=True)
    is_same = all(np.array_equal(one[1], one[2]) for one in (ends, halves))
    print(f"in RAM: {'the same' if is_same else 'OTHER'} bits", flush=True)
    return {**made, "num_tokens": prompt, "rows": rows, "apart": apart, "same_in_ram": is_same}
