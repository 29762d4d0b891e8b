"""Run by test_ranks.py, test_rank_batches.py and test_rank_states.py.

python ranks_script.py ranks FOLDER JSON     ranks as torchrun starts them, but forks of this process;
                                             JSON: [[bundle, [[number of ranks, bytes of VRAM], ...], and more
                                             settings if there are], ...]
python ranks_script.py batches FOLDER JSON   the same, with several sequences
python ranks_script.py memory FOLDER JSON    the same, with ranks that run out of memory
python ranks_script.py decode FOLDER JSON    the same, with tokens that several ranks decode
python ranks_script.py states FOLDER JSON    the same, with a model whose tokens overwrite a state
python ranks_script.py session BUNDLE        ranks as --gpus 3 starts them; obeys lines of standard input
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))
import rank_batches
import rank_decode
import rank_states

from krasis.formats.errors import KrasisError
from krasis.runtime.distributed.launch import open_engine
from krasis.runtime.engine import Engine
from krasis.runtime.gpu import exchange
from krasis.runtime.gpu.backend import GpuBackend
from krasis.runtime.gpu.experts import residency
from krasis.runtime.gpu.opening import open_device
from krasis.runtime.settings import EngineSettings

SETTINGS = EngineSettings(device="double", context=64, prefault=False, gpu_dtype="f16", threads=1)
LENGTHS = (1, 2, 3, 9)  # fewer tokens than ranks, as many, more
SECOND_TURN, EDITED_TURN = [7, 8, 9, 10, 11], [20, 21, 22]
CHECK = 0  # instead of a number of ranks

torch.set_num_threads(1)


def compute(engine: Engine, folder: Path, num_ranks: int) -> dict[str, np.ndarray]:
    """Prompts of several lengths, then a conversation: prompt, decoded tokens, another turn, an edited
    turn."""
    found = {}
    for length in LENGTHS:
        engine.reset()
        found[f"logits_{length}"] = engine.prefill(list(range(1, length + 1)), all_logits=True)
    found["placement"] = np.array([engine.placement[0], engine.description, engine.placement[1]])
    greedy = [int(found["logits_9"][-1].argmax())]
    for step in range(4):
        logits = engine.decode(greedy[-1]).copy()
        found[f"decoded_{step}"] = logits
        greedy.append(int(logits.argmax()))
    engine.save_prefix(folder / f"{num_ranks}.kv")
    found["second_turn"] = engine.prefill(SECOND_TURN, all_logits=True)
    engine.decode(12)
    engine.truncate(11)  # in the middle of what was decoded
    found["edited_turn"] = engine.prefill(EDITED_TURN)
    found["greedy"] = np.array(greedy)
    engine.load_prefix(folder / "1.kv")
    found["loaded_turn"] = engine.prefill(SECOND_TURN, all_logits=True)
    return found


def check(engine: Engine, folder: Path) -> dict[str, np.ndarray]:
    """What one rank makes of the turns after each number of ranks' own cache."""
    found = {}
    for path in folder.glob("*.kv"):
        engine.load_prefix(path)
        found[f"second_turn_{path.stem}"] = engine.prefill(SECOND_TURN, all_logits=True)
        engine.truncate(11)
        found[f"edited_turn_{path.stem}"] = engine.prefill(EDITED_TURN)
    return found


def results(job: str, engine: Engine, folder: Path, num_ranks: int) -> dict[str, np.ndarray]:
    if job == "batches":
        return rank_batches.compute(engine._backend)
    if job == "memory":
        return rank_batches.out_of_memory(engine._backend)
    if job == "decode":
        return rank_decode.compute(engine._backend)
    if job == "states":
        return rank_states.compute(engine, folder, num_ranks)
    return check(engine, folder) if num_ranks == CHECK else compute(engine, folder, num_ranks)


def rank_main(
    job: str, bundle: Path, folder: Path, rank: int, num_ranks: int, port: int, changes: dict[str, Any]
) -> None:
    slots = 1 if job == "ranks" else rank_batches.SLOTS
    if job == "memory":
        rank_batches.lack_memory(rank, num_ranks)
    if job in ("memory", "states"):
        exchange.BESIDE_BYTES = 0
    if job == "decode":
        slots, residency.NOTE_TOKENS = rank_decode.SLOTS, rank_decode.NOTE_TOKENS
    settings = replace(SETTINGS, slots=slots, **changes)
    os.environ |= {
        "KRASIS_JOIN": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if num_ranks <= 1:
        engine = Engine.open(bundle, settings, lambda b, s: GpuBackend(b, s, open_device(s)))
    else:
        engine = open_engine(bundle, settings)
    if engine is not None:
        with engine:
            np.savez(folder / f"{num_ranks}.npz", **results(job, engine, folder, num_ranks))


def fork_ranks(job: str, bundle: Path, folder: Path, num_ranks: int, changes: dict[str, Any]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(max(num_ranks, 1)):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                rank_main(job, bundle, folder, rank, num_ranks, port, changes)
                code = 0
            except BaseException:  # noqa: BLE001  # the child of a fork must end here, whatever happened
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


def session(bundle: Path) -> int:
    with open_engine(bundle, SETTINGS, 3) as engine:
        engine.prefill([1, 2, 3])
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        print("ready", children, flush=True)
        for line in sys.stdin:
            engine.reset()
            try:
                if line.startswith("decoding"):
                    engine.prefill([1, 2, 3])
                    print("decodes", flush=True)
                    while True:
                        engine.decode(4)
                        engine.truncate(3)
                if line.startswith("interrupted"):
                    threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
                    while True:
                        engine.prefill([1, 2, 3, 4, 5])
                        engine.reset()
                engine.prefill([1, 2, 3, 4, 5])
            except KrasisError as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                return error.exit_code
            except KeyboardInterrupt:
                print("KeyboardInterrupt", flush=True)
                continue
            print("done", flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "session":
        sys.exit(session(Path(sys.argv[2])))
    job, failed = sys.argv[1], 0
    for index, (bundle, sizes, *changes) in enumerate(json.loads(sys.argv[3])):
        own = Path(sys.argv[2]) / str(index)
        own.mkdir()
        for num_ranks, vram in sizes:
            settings = {"vram_bytes": vram, **(changes[0] if changes else {})}
            failed += fork_ranks(job, Path(bundle), own, num_ranks, settings)
    sys.exit(failed)
