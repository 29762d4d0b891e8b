"""Saves prefixes in children that die by SIGKILL at each system call, and reports what they leave.

    python kill_saves.py EMPTY_FOLDER

Prints one line of JSON: how many died, and every outcome that is neither nothing, nor the old file, nor the
new one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import format_builders

from krasis.formats.bundle.reader import Bundle
from krasis.formats.files.file_ops import FileOps
from krasis.runtime.state.kv_file import PrefixFile, save_prefix


class KillOps(FileOps):
    """Dies at system call number ``call`` (from 1; 0: never), before or after it is done."""

    def __init__(self, call: int, late: bool) -> None:
        self.left, self.late = call, late

    def die_if(self, *, late: bool) -> None:
        if self.left == 0 and self.late == late:
            os.kill(os.getpid(), signal.SIGKILL)


def _dying(name: str) -> Callable[..., Any]:
    def call(self: KillOps, *arguments: Any) -> Any:
        self.left -= 1
        self.die_if(late=False)
        result = getattr(FileOps, name)(self, *arguments)
        self.die_if(late=True)
        return result

    return call


for _name in [name for name in vars(FileOps) if not name.startswith("_")]:
    setattr(KillOps, _name, _dying(_name))


def outcome(bundle: Bundle, folder: Path, is_old: bool) -> str:
    """What is wrong with what was left; empty if nothing is."""
    names = {one.name for one in folder.iterdir()}
    # A new name is taken in one step. Over an old file there is a moment with the complete new one beside it.
    if names - {"a.kv"} and not (is_old and names == {"a.kv", "a.kv.partial"}):
        return f"left {sorted(names)}"
    if "a.kv" not in names:
        return "the old file is gone" if is_old else ""
    with PrefixFile(folder / "a.kv") as file:
        file.verify()
        held = len(file.tokens(bundle.architecture))
    return "" if held in ((2, 5) if is_old else (5,)) else f"{held} tokens"


def main(root: Path) -> None:
    """Every call, before and after, with and without an old file."""
    bundle = Bundle.open(format_builders.write_bundle(root / "model.krasis"))
    cache = conftest.StubCache(bundle.architecture, 20, "f16", seed=1)
    killed, wrong = 0, []
    for is_old in (False, True):
        for late in (False, True):
            for call in range(1, 100):
                folder = root / f"{is_old}-{late}-{call}"
                folder.mkdir()
                if is_old:
                    save_prefix(folder / "a.kv", bundle, cache, [1, 2])
                pid = os.fork()
                if pid == 0:
                    save_prefix(folder / "a.kv", bundle, cache, [1, 2, 3, 4, 5], io=KillOps(call, late))
                    os._exit(0)
                _, status = os.waitpid(pid, 0)
                if problem := outcome(bundle, folder, is_old):
                    wrong.append(f"{folder.name}: {problem}")
                if not os.WIFSIGNALED(status):
                    break
                killed += 1
    print(json.dumps({"killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
