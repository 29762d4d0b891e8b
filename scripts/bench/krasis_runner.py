#!/usr/bin/env python3
"""Times a bundle as llama-bench times a GGUF, and prints one JSON object.

ppN: tokens/s of one prefill of N random ids into an empty context. tgN: tokens/s of decoding N random ids,
one by one, from an empty context. Around each sample the read bandwidth of the same threads over the bundle's
own experts is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from krasis.formats.bundle.reader import Bundle
from krasis.formats.native import Pool, check, library_path
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.native import prototype
from krasis.runtime.host.huge_pages import huge_share
from krasis.runtime.host.prefault import files_of_tiers
from scripts.device.limits import streaming_vram_bytes

WINDOW_BYTES = 256 << 20


class Meter:
    """Read bandwidth over windows of the experts, one after another, so that nothing is still in a cache."""

    def __init__(self, bundle: Bundle, pool: Pool) -> None:
        self._pool, self._next = pool, 0
        self._windows: list[tuple[int, int]] = []
        for stored in bundle.manifest.blobs:
            if stored.tier != "cpu":
                continue
            blob = bundle.map(stored.name)
            address, size = int(blob.__array_interface__["data"][0]), min(blob.nbytes, WINDOW_BYTES)
            self._windows += [(address + i * size, size) for i in range(blob.nbytes // size)]

    def gbps(self) -> float:
        address, size = self._windows[self._next % len(self._windows)]
        self._next += 1
        seconds = ctypes.c_double()
        status = prototype("krasis_read_bandwidth")(self._pool.handle, address, size, ctypes.byref(seconds))
        check(status, "krasis_read_bandwidth")
        return size / seconds.value / 1e9


def token_bytes(bundle: Bundle) -> int:
    """Weights that decoding one token reads: all dense ones but the embedding, and the routed experts."""
    experts = [layer.experts for layer in bundle.spec.layers]
    total = 0
    for blob in bundle.manifest.blobs:
        if blob.tier == "dense" and blob.name != "embedding":
            total += blob.num_bytes
        elif blob.tier == "cpu":
            routed = experts[int(blob.name.split(".")[1])]
            if routed is not None:
                total += blob.num_bytes * routed.router.top_k // routed.count
    return total


def huge_fraction(bundle: Bundle) -> float:
    """The part of the CPU experts' mappings that the page tables map by huge pages; NaN if none is."""
    share = huge_share([bundle.mapping_of(file) for file in files_of_tiers(bundle, ("cpu",))])
    return float("nan") if share is None else share


def sample(work: Callable[[], int], meter: Meter, repeats: int) -> dict[str, list[float]]:
    """work() gives a number of tokens; tokens/s of each repetition, bandwidth before and after."""
    rates, bandwidth = [], [meter.gbps()]
    for _ in range(repeats):
        begin = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - begin))
        bandwidth.append(meter.gbps())
    return {"tokens_per_s": rates, "read_gbps": bandwidth}


def measure(
    engine: Engine, meter: Meter, prompts: list[int], generate: list[int], repeats: int
) -> dict[str, Any]:
    """Samples by case."""
    rng = np.random.default_rng(0)
    vocab = engine.bundle.spec.vocab

    def prefill(count: int) -> int:
        engine.reset()
        engine.prefill(rng.integers(0, vocab, count).tolist())
        return count

    def decode(count: int) -> int:
        engine.reset()
        for token in rng.integers(0, vocab, count).tolist():
            engine.decode(token)
        return count

    cases: dict[str, Any] = {}
    for count in prompts:
        prefill(count)
        cases[f"pp{count}"] = sample(lambda count=count: prefill(count), meter, repeats)  # type: ignore[misc]
    for count in generate:
        decode(8)
        cases[f"tg{count}"] = sample(lambda count=count: decode(count), meter, repeats)  # type: ignore[misc]
    weights_bytes = token_bytes(engine.bundle)
    for name, case in cases.items():
        if name.startswith("tg"):
            case["weights_gbps"] = [rate * weights_bytes / 1e9 for rate in case["tokens_per_s"]]
    return cases


def open_on(bundle: Path, settings: EngineSettings, num_gpus: int) -> Engine:
    """The engine on so many GPUs, or on the CPU, which then never sees torch."""
    if not num_gpus:
        return Engine.open(bundle, settings)
    from krasis.runtime.distributed.launch import open_engine

    engine = open_engine(bundle, settings, num_gpus)
    if engine is None:
        raise SystemExit("not to be started by torchrun: it starts its own processes")
    return engine


def stream_bytes(path: Path, context: int) -> int:
    """The memory that no expert finds room in, beside the buffers that all of them pass through."""
    with Bundle.open(path) as bundle:
        return streaming_vram_bytes(bundle, context, "cuda")


def check_streamed(backend: Any) -> None:
    """Ends the program if an expert stayed on the GPU after all: two layers fit in the buffers."""
    if resident := getattr(backend, "num_resident_experts", 0):
        raise SystemExit(f"--stream: {resident} experts found room on the GPU; take a model of more layers")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if int(part) > 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-p", "--prompt", type=numbers, default=[512])
    parser.add_argument("-n", "--generate", type=numbers, default=[64])
    parser.add_argument("-r", "--repeats", type=int, default=1)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--gpus", type=int, default=0, help="0: the CPU alone.")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="Let a GPU have only what a prompt needs whose experts all stay in host memory.",
    )
    parser.add_argument(
        "--chunk", type=int, default=0, help="Prompt tokens computed in one pass; 0: the engine's."
    )
    options = parser.parse_args()
    context = max(options.prompt + options.generate + [64])
    chunk = {"prefill_chunk": options.chunk} if options.chunk else {}
    settings = EngineSettings(
        context=context,
        threads=options.threads,
        isa=options.isa,
        device="cuda" if options.gpus else "cpu",
        vram_bytes=stream_bytes(options.bundle, context) if options.stream and options.gpus else None,
        **chunk,
    )
    with (
        open_on(options.bundle, settings, options.gpus) as engine,
        Pool(options.threads, options.isa) as pool,
    ):
        engine.wait_until_read()
        meter = Meter(engine.bundle, pool)
        cases = measure(engine, meter, options.prompt, options.generate, options.repeats)
        if options.stream:  # hot experts would have moved in by now
            check_streamed(engine._backend)
        library = library_path()
        result = {
            "cases": cases,
            "isa": pool.isa,
            "token_bytes": token_bytes(engine.bundle),
            "huge_page_fraction": huge_fraction(engine.bundle),
            "engine": engine.description,
            "library": str(library),
            "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest()[:12],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
