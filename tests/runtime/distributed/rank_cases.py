"""What one rank does in the tests of collectives and failures; run by ``fork_ranks.py``."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from krasis.formats.errors import KrasisError, ResourceError
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.distributed import control as control_module
from krasis.runtime.distributed import watch
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.torch_parallel import TorchParallel, abort_group, join_group, leave_group
from krasis.runtime.gpu.parallel import KvPart

# The sequences of a chunk by their numbers of tokens.
CHUNKS = (
    (1,),
    (2,),
    (3,),
    (4,),
    (5,),
    (7,),
    (8,),
    (13,),
    (1, 1, 1),
    (5, 1, 2),
    (3, 9),
    (1,) * 9,
    (2, 14, 1, 6),
)
NUM_EXPERTS, TOP_K, HIDDEN, KV_HEADS, HEAD_DIM, CAPACITY = 7, 3, 8, 2, 4, 24
LINGER_S = 20.0
PATIENCE_S = 120.0

torch.set_num_threads(1)


def start_of(sequence: int) -> int:
    """Positions in its cache before the chunk."""
    return (6, 0, 9)[sequence % 3]


def name_of(lengths: tuple[int, ...]) -> str:
    return "-".join(map(str, lengths))


def problem(lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A layer's inputs, the same on every rank and in the test. keys, values: by sequence."""
    num_tokens = sum(lengths)
    r = np.random.default_rng(lengths)
    ids = np.stack([r.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    return {
        "x": r.standard_normal((num_tokens, HIDDEN)).astype(np.float32),
        "hidden": r.standard_normal((num_tokens, HIDDEN)).astype(np.float32),
        "ids": ids.astype(np.int32),
        "weights": r.random((num_tokens, TOP_K)).astype(np.float32),
        "experts": r.standard_normal((NUM_EXPERTS, HIDDEN, HIDDEN)).astype(np.float32),
        "keys": r.standard_normal((len(lengths), KV_HEADS, CAPACITY, HEAD_DIM)).astype(np.float32),
        "values": r.standard_normal((len(lengths), KV_HEADS, CAPACITY, HEAD_DIM)).astype(np.float32),
    }


@contextmanager
def joined(place, silence_s=PATIENCE_S):
    control = Control(place, silence_s=silence_s)
    control.on_failure(abort_group)
    control.agree(0)
    join_group(place, torch.device("cpu"))
    try:
        yield TorchParallel(place, control, NUM_EXPERTS), control
    finally:
        failed = control.failure is not None
        leave_group(failed=failed)
        # Rank 0's process runs the store: gone before the others have left, it looks to them as if it had
        # died.
        control.close(linger_s=LINGER_S if place.rank == 0 and not failed else 0.0)


def layer(place, folder: Path) -> None:
    """A mixture layer and an exchange of keys, in f32 and with 16-bit sums, on a device that checks the
    order."""
    with joined(place) as (parallel, _):
        for sum_dtype in (torch.float32, torch.bfloat16):
            found = {}
            for lengths in CHUNKS:
                device = DeviceDouble(seed=place.rank + sum(lengths))
                outcome = run_layer(parallel, lengths, device, sum_dtype)
                found |= {
                    f"{name_of(lengths)}_{name}": tensor.float().numpy() for name, tensor in outcome.items()
                }
            np.savez(folder / f"{place.rank}_{str(sum_dtype).removeprefix('torch.')}.npz", **found)


def run_layer(
    parallel: TorchParallel, lengths: tuple[int, ...], device: DeviceDouble, sum_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    p = {name: torch.from_numpy(array) for name, array in problem(lengths).items()}
    stream, num_tokens = device.stream("compute"), sum(lengths)
    rows, gathered = parallel.rows_per_rank(num_tokens), parallel.gathered_rows(num_tokens)
    segments, own = parallel.own_segments(lengths), parallel.own_tokens(num_tokens)

    def local(name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = device.empty((rows, p[name].shape[1]), dtype)
        mine = torch.cat([p[name][begin:end] for begin, end in segments] or [p[name][:0]])
        stream.launch("fill", lambda _: tensor[:own].copy_(mine), reads=[], writes=[tensor[:own]])
        return tensor

    def full(like: torch.Tensor) -> torch.Tensor:
        return device.empty((gathered, like.shape[1]), like.dtype)

    x, ids, weights, hidden = (
        local("x", torch.float32), local("ids", torch.int32), local("weights", torch.float32),
        local("hidden", torch.float32),
    )  # fmt: skip
    all_x, all_ids, all_weights = full(x), full(ids), full(weights)
    parallel.gather_tokens(stream, x, all_x, num_tokens)
    parallel.gather_tokens(stream, weights, all_weights, num_tokens)
    parallel.gather_ids(stream, ids, all_ids, num_tokens)
    partial = device.empty((gathered, HIDDEN), sum_dtype)

    def experts(_: int) -> None:
        total = torch.zeros(gathered, HIDDEN)
        for row in range(gathered):
            for expert, weight in zip(all_ids[row].tolist(), all_weights[row], strict=True):
                if expert >= 0:
                    total[row] += weight * (all_x[row] @ p["experts"][expert])
        partial.copy_(total)

    stream.launch("experts", experts, reads=[all_x, all_ids, all_weights], writes=[partial])
    scratch = device.empty((gathered, HIDDEN), sum_dtype) if num_tokens % 2 else None
    parallel.scatter_sum(stream, partial, hidden, num_tokens, scratch)
    all_hidden, ordered = full(hidden), device.empty((num_tokens, HIDDEN), torch.float32)
    parallel.gather_tokens(stream, hidden, all_hidden, num_tokens)
    parallel.restore_order(stream, all_hidden, ordered, lengths)
    caches = exchange_kv(parallel, lengths, device, stream, p)
    stream.synchronize()
    return {"hidden": ordered, "ids": all_ids, **caches}


def exchange_kv(parallel, lengths, device, stream, p) -> dict[str, torch.Tensor]:
    """Rank 0 has what is before the chunk, each rank what its tokens are; in the end all have all."""
    caches: list[list[torch.Tensor]] = []
    owned = parallel.own_segments(lengths)
    begin_row = 0
    for index, length in enumerate(lengths):
        start = start_of(index)
        inside = [(max(b, begin_row), min(e, begin_row + length)) for b, e in owned]
        pieces = [(start + b - begin_row, start + e - begin_row) for b, e in inside if b < e]
        begin_row += length
        caches.append([])
        for name in ("keys", "values"):
            cache = device.empty((KV_HEADS, CAPACITY, HEAD_DIM), torch.float32)
            for begin, end in pieces + ([(0, start)] if parallel.rank == 0 and start else []):
                stream.launch(
                    "store",
                    lambda _, c=cache, b=begin, e=end, full=p[name][index]: c[:, b:e].copy_(full[:, b:e]),
                    reads=[],
                    writes=[cache[:, begin:end]],
                )
            caches[-1].append(cache)
    before = [KvPart(*cache, 0, start_of(index)) for index, cache in enumerate(caches) if start_of(index)]
    room = (
        device.empty((parallel.gathered_rows(sum(lengths)) * 200,), torch.uint8) if len(lengths) % 2 else None
    )
    parallel.send_kv(stream, before, room)
    ends = [start_of(index) + length for index, length in enumerate(lengths)]
    parallel.share_kv(stream, [KvPart(*cache, start_of(i), ends[i]) for i, cache in enumerate(caches)], room)
    return {
        f"{name}_{index}": cache[number][:, : ends[index]]
        for index, cache in enumerate(caches)
        for number, name in enumerate(("keys", "values"))
    }


def note(folder: Path, place, text: str) -> None:
    (folder / f"{place.rank}.txt").write_text(text)


def in_step(parallel: TorchParallel, control: Control, device: DeviceDouble, before=lambda: None) -> None:
    """One collective, with something before it."""
    local = torch.ones(1, 4)
    stream = device.stream("compute")
    local, full = device.empty((1, 4), torch.float32), device.empty((parallel.num_ranks, 4), torch.float32)
    stream.launch("fill", lambda _: local.fill_(1.0), reads=[], writes=[local])
    with control.joint("prefill"):
        before()
        parallel.gather_tokens(stream, local, full, parallel.num_ranks)
        stream.synchronize()


def failing(place, folder: Path, before, silence_s: float = PATIENCE_S, on_join=None) -> None:
    """A round that works, then one that does not; notes what this rank saw and after how long."""
    with joined(place, silence_s=silence_s) as (parallel, control):
        device = DeviceDouble()
        if on_join is not None:
            threading.Thread(target=on_join, args=(control,), daemon=True).start()
        in_step(parallel, control, device)
        begin = time.monotonic()
        try:
            in_step(parallel, control, device, lambda: before(place))
            note(folder, place, "no error")
        except KrasisError as error:
            note(folder, place, f"{time.monotonic() - begin:.1f} {type(error).__name__}: {error}")


def killed(place, folder: Path) -> None:
    """The last rank is killed: nobody can be told by it."""

    def before(place) -> None:
        if place.rank == place.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    failing(place, folder, before)


def raising(place, folder: Path) -> None:
    """The last rank has an error of its own, which is there before anybody asks for it; on a busy machine
    ranks get much time to hear of it, and to say so."""
    control_module.NEWS_S = watch.WORKER_GRACE_S = watch.FIRST_RANK_GRACE_S = PATIENCE_S

    def before(place) -> None:
        if place.rank == place.num_ranks - 1:
            raise ResourceError("no room", where="test", got=7)

    failing(place, folder, before)


def silent(place, folder: Path) -> None:
    """The last rank stops and says nothing, its sockets open; once that is noticed it is killed, as a
    launcher does."""
    pid_file = folder / "pid"
    if place.rank == place.num_ranks - 1:
        pid_file.write_text(str(os.getpid()))

    def before(place) -> None:
        if place.rank == place.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    def kill(control: Control) -> None:
        while control.failure is None:
            time.sleep(0.05)
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    failing(place, folder, before, silence_s=1.5, on_join=kill if place.rank == 0 else None)


def differing(place, folder: Path) -> None:
    """Ranks that do not have the same model."""
    control = Control(place)
    try:
        control.same("settings", "b" if place.rank == 1 else "a")
    except KrasisError as error:
        note(folder, place, str(error))
    control.close(linger_s=5.0 if place.hosts_store else 0.0)
