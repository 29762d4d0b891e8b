"""Kills conversions that download with SIGKILL and reports what they leave. Started by test_streamed.py.

    python kill_streamed.py NUM_KILLS SEED OUT INPUT...

Each conversion continues what the one before it left; the last one is not killed. Prints one line of JSON.
This process has no threads, so it can fork; its children do the work.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from io import StringIO
from pathlib import Path

from krasis.convert.conversion import convert, prepare
from krasis.convert.hub import fetcher, opening, streamed  # before the forks
from krasis.convert.hub.inputs import opened_inputs, parse_inputs
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings

fetcher.PART_BYTES = 64 << 10
streamed._SLACK_BYTES = 0
opening._FIRST_BYTES = 16 << 10


def start(texts: list[str], out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            reporter, settings = Reporter(0, StringIO()), ConvertSettings()
            inputs = parse_inputs(texts)
            with opened_inputs(inputs, out, reporter, restart=False, plan_only=False, drop=True) as (
                paths,
                more,
            ):
                convert(prepare(paths, out, settings, reporter, more), reporter)
            status = 0
        except BaseException as error:  # noqa: BLE001 -- a forked child must not return
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(status)
    return pid


def held_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    except OSError:  # removed meanwhile
        return 0


def main() -> None:
    kills, seed, out, *texts = sys.argv[1:]
    rng, folder = random.Random(int(seed)), Path(f"{out}.sources")
    statuses: list[int] = []
    most, usual_s = 0, 0.6
    while True:
        begin = time.monotonic()
        pid = start(texts, Path(out))
        limit_s = rng.uniform(0, usual_s) if len(statuses) < int(kills) else 600.0
        status = 0
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            most = max(most, held_bytes(folder))
            if done:
                break
            if time.monotonic() - begin > limit_s:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.002)
        if os.WIFSIGNALED(status):
            statuses.append(-os.WTERMSIG(status))
            continue
        if Path(out).exists():
            break
        statuses.append(os.waitstatus_to_exitcode(status))
        break
    print(json.dumps({"statuses": statuses, "most_bytes": most, "sources_left": folder.exists()}))


if __name__ == "__main__":
    main()
