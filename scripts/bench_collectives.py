#!/usr/bin/env python3
"""What ranks exchange for a layer of prefill: checked bit by bit against the plain computation, then timed.

    python -m scripts.bench_collectives --gpus 2
    python -m scripts.bench_collectives --gpus 3 --device double --tokens 300 --hidden 256     (Gloo, no GPU)

Prints one JSON object; exit code 1 if a result differs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch

from krasis.runtime.device.api import Device, Stream
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.devices import open_rank_device
from krasis.runtime.distributed.place import Place, host_store
from krasis.runtime.distributed.torch_parallel import TorchParallel, abort_group, join_group, leave_group
from krasis.runtime.gpu.parallel import KvPart
from krasis.runtime.settings import EngineSettings

NUM_EXPERTS, TOP_K, KV_HEADS, HEAD_DIM, START, WARM_UP = 128, 8, 4, 128, 96, 3


class Exchange:
    """One layer's tensors on one rank. Everything on the device is a function of (tokens, hidden)."""

    def __init__(self, device: Device, parallel: TorchParallel, num_tokens: int, hidden: int) -> None:
        self.device, self.parallel, self.num_tokens = device, parallel, num_tokens
        self.stream: Stream = device.stream("compute")
        r = torch.Generator().manual_seed(num_tokens)
        self.x = torch.randn((num_tokens, hidden), generator=r).to(torch.bfloat16)
        self.ids = torch.randint(0, NUM_EXPERTS, (num_tokens, TOP_K), generator=r, dtype=torch.int32)
        # Rank r's part of the sum is the r-th of these, a row for each token.
        self.parts = torch.randn((parallel.num_ranks, num_tokens, hidden), generator=r).to(torch.bfloat16)
        shape = (KV_HEADS, START + num_tokens, HEAD_DIM)
        self.keys, self.values = (torch.randn(shape, generator=r).to(torch.bfloat16) for _ in range(2))
        rows, gathered = parallel.rows_per_rank(num_tokens), parallel.gathered_rows(num_tokens)
        self.local_x = self.upload(self.own_rows(self.x), rows)
        self.local_ids = self.upload(self.own_rows(self.ids), rows)
        self.all_x = device.empty((gathered, hidden), torch.bfloat16)
        self.all_ids = device.empty((gathered, TOP_K), torch.int32)
        self.partial = self.upload(self.by_rank(self.parts[parallel.rank]), gathered)
        self.scratch = device.empty((gathered, hidden), torch.bfloat16)
        self.hidden, self.exact = (self.upload(torch.zeros(rows, hidden), rows) for _ in range(2))
        self.wide = self.upload(self.by_rank(self.parts[parallel.rank].float()), gathered)
        self.wide_scratch = device.empty((gathered, hidden), torch.float32)
        self.cache = [self.upload(torch.zeros(shape, dtype=torch.bfloat16), shape[0]) for _ in range(2)]
        self.begin_kv()

    def own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        segments = self.parallel.own_segments((self.num_tokens,))
        return torch.cat([tensor[begin:end] for begin, end in segments] or [tensor[:0]])

    def by_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(
            (self.parallel.gathered_rows(self.num_tokens), tensor.shape[1]), dtype=tensor.dtype
        )
        for begin, end, row in self.parallel.partition.blocks((self.num_tokens,)):
            rows[row : row + end - begin] = tensor[begin:end]
        return rows

    def upload(self, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        made = self.device.empty((num_rows, *tensor.shape[1:]), tensor.dtype)
        self.write(made[: len(tensor)], tensor)
        return made

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.stream.launch("fill", lambda _: destination.copy_(source), reads=[], writes=[destination])
        self.stream.synchronize()

    def begin_kv(self) -> None:
        """The cache as a layer leaves it: own positions, and on rank 0 those before the chunk."""
        for cache, full in zip(self.cache, (self.keys, self.values), strict=True):
            for begin, end in self.parallel.own_segments((self.num_tokens,)):
                self.write(cache[:, START + begin : START + end], full[:, START + begin : START + end])
            if self.parallel.rank == 0:
                self.write(cache[:, :START], full[:, :START])

    def calls(self) -> dict[str, tuple[Callable[[], None], int]]:
        """name -> (what is timed, bytes a rank receives in it)."""
        p, n, s = self.parallel, self.num_tokens, self.stream
        others = p.gathered_rows(n) - p.rows_per_rank(n)
        row_bytes, kv_bytes = self.x.shape[1] * 2, KV_HEADS * HEAD_DIM * 4
        return {
            "gather_tokens": (lambda: p.gather_tokens(s, self.local_x, self.all_x, n), others * row_bytes),
            "gather_ids": (lambda: p.gather_ids(s, self.local_ids, self.all_ids, n), others * TOP_K * 4),
            "scatter_sum": (
                lambda: p.scatter_sum(s, self.partial, self.hidden, n, self.scratch),
                others * row_bytes,
            ),
            "scatter_sum in f32": (
                lambda: p.scatter_sum(s, self.wide, self.exact, n, self.wide_scratch),
                others * 2 * row_bytes,
            ),
            "share_kv": (lambda: p.share_kv(s, [KvPart(*self.cache, START, START + n)]), others * kv_bytes),
            "send_kv": (
                lambda: p.send_kv(s, [KvPart(*self.cache, 0, START)]),
                START * kv_bytes if p.rank else 0,
            ),
        }

    def wrong(self) -> list[str]:
        """Names of results that are not what they should be, after each call was made once."""
        p, own = self.parallel, self.parallel.own_tokens(self.num_tokens)
        expected_sum = torch.zeros((self.num_tokens, self.x.shape[1]))
        for part in self.parts:  # in the order of the ranks, in f32: the same bits
            expected_sum += part
        ids = self.by_rank(self.ids + 1) - 1  # padding: -1
        mine = (ids >= p.first_expert) & (ids < p.first_expert + p.num_experts)
        pairs = {
            "gather_tokens": (self.all_x, self.by_rank(self.x)),
            "gather_ids": (self.all_ids, ids.masked_fill(~mine, -1)),
            "scatter_sum": (self.hidden[:own], self.own_rows(expected_sum)),
            "scatter_sum in f32": (self.exact[:own], self.own_rows(expected_sum)),
            "share_kv: keys": (self.cache[0], self.keys),
            "share_kv: values": (self.cache[1], self.values),
        }
        return [name for name, (found, right) in pairs.items() if not torch.equal(found.cpu(), right)]


def rank_main(place: Place, tokens: list[int], hidden: int, device_name: str, repeats: int) -> dict[str, Any]:
    """One rank's part; rank 0's result is printed."""
    store = host_store(place) if place.hosts_store else None
    control = Control(place)
    device = open_rank_device(EngineSettings(device=device_name), place)
    control.on_failure(abort_group)
    control.agree(0)
    join_group(place, device.torch_device)
    parallel = TorchParallel(place, control, NUM_EXPERTS)
    report: dict[str, Any] = {"ranks": place.num_ranks, "device": device.description, "hidden": hidden}
    wrong: list[str] = []
    for num_tokens in tokens:
        exchange = Exchange(device, parallel, num_tokens, hidden)
        for call, _ in exchange.calls().values():
            with control.joint("check"):
                call()
                exchange.stream.synchronize()
        wrong += [f"{num_tokens} tokens: {name}" for name in exchange.wrong()]
    report["calls"] = {
        name: timed(exchange, control, call, num_bytes, repeats)
        for name, (call, num_bytes) in exchange.calls().items()
    }
    report["wrong"] = [text for text in control.exchange(", ".join(wrong)) if text]
    leave_group(failed=False)
    control.close(linger_s=5.0 if store is not None else 0.0)
    return report


def timed(
    exchange: Exchange, control: Control, call: Callable[[], None], num_bytes: int, repeats: int
) -> dict[str, Any]:
    """Seconds of a call when many follow each other, as in a pass."""
    for count in (WARM_UP, repeats):
        control.agree(0)
        begin = time.perf_counter()
        for _ in range(count):
            call()
        exchange.stream.synchronize()
        seconds = (time.perf_counter() - begin) / count
    slowest = max(float(text) for text in control.exchange(str(seconds)))
    return {"s": slowest, "received_bytes": num_bytes, "gbps": num_bytes / slowest / 1e9}


def start_ranks(num_ranks: int) -> int:
    """This command once for each rank; gives the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        place = Place(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, rank == 0, "krasis/0")
        environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **place.environment()}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return max(process.wait() for process in processes)


@click.command(help=__doc__)
@click.option("--gpus", default=2, show_default=True, help="Ranks on this host.")
@click.option("--tokens", default="1,2,7,64,10000", show_default=True, help="The last number is timed.")
@click.option("--hidden", default=4096, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "double"]), default="cuda", show_default=True)
@click.option("--repeats", default=20, show_default=True)
def main(gpus: int, tokens: str, hidden: int, device: str, repeats: int) -> None:
    if "RANK" not in os.environ:
        sys.exit(abs(start_ranks(gpus)))
    counts = [int(text) for text in tokens.split(",")]
    report = rank_main(Place.from_environment(), counts, hidden, device, repeats)
    if os.environ["RANK"] == "0":
        print(json.dumps(report, indent=1))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()
