"""Opening a bundle that lies on disk, cold and warm, against what disk and memory give."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scripts.device import places, rates
from scripts.device.context import Context
from scripts.device.devices import facts_of, open_engine

LABEL = "30b"
READ_BYTES, READERS = 16 * 2**20, 8
PROMPT = 64


def run(context: Context) -> dict[str, Any]:
    """Seconds until the engine is open, until all experts are pinned, until a short prompt's first token."""
    bundle, made = places.bundle_on_disk(context, LABEL)
    shard = max(bundle.glob("gpu-*.safetensors"), key=lambda path: path.stat().st_size)
    drop_cache(bundle)
    disk_gbps, how = read_gbps(shard)
    result: dict[str, Any] = {
        **made,
        "disk_gbps": disk_gbps,
        "disk_read": how,
        "host_read_gbps": rates.host_read_gbps(),
        "runs": {},
    }
    for name in ("cold", "warm"):
        dropped = drop_cache(bundle) if name == "cold" else ""
        result["runs"][name] = {"cache": dropped, **open_once(context, bundle)}
    return result


def open_once(context: Context, bundle: Path) -> dict[str, Any]:
    """One start."""
    begin = time.perf_counter()
    with open_engine(context, bundle, PROMPT + 2) as engine:
        open_s = time.perf_counter() - begin
        ids = np.random.default_rng(3).integers(0, engine.architecture.vocab_size, PROMPT)
        engine.prefill(ids)
        first_token_s = time.perf_counter() - begin
        store = getattr(getattr(engine._backend, "_parts", None), "store", None)
        load: dict[str, Any] = {}
        if store is not None:
            store.wait_loaded()
            load = asdict(store.load_report())
        return {
            "open_s": open_s,
            "first_token_s": first_token_s,
            "loaded_s": time.perf_counter() - begin,
            "load": load,
            "engine": facts_of(engine),
        }


def drop_cache(bundle: Path) -> str:
    """Asks the kernel to forget a bundle's pages; says what was done."""
    for path in bundle.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return "pages of these files given back"
    return "page cache dropped"


def read_gbps(path: Path) -> tuple[float, str]:
    """Rate of parallel reads past the page cache, of at most 8 GiB of a file; through it where that is
    refused.
    """
    num_bytes = min(path.stat().st_size, 8 * 2**30) // READ_BYTES * READ_BYTES
    if not num_bytes:
        return 0.0, "the file is too small to tell"
    try:
        fd, how = os.open(path, os.O_RDONLY | os.O_DIRECT), f"{READERS} direct readers"
    except OSError:
        fd, how = os.open(path, os.O_RDONLY), f"{READERS} readers through the page cache"

    def read(offset: int) -> None:
        with mmap.mmap(-1, READ_BYTES) as buffer:
            done = 0
            while done < READ_BYTES:
                done += os.preadv(fd, [memoryview(buffer)[done:]], offset + done)

    try:
        begin = time.perf_counter()
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(read, range(0, num_bytes, READ_BYTES)):
                pass
        return num_bytes / (time.perf_counter() - begin) / 1e9, how
    finally:
        os.close(fd)
