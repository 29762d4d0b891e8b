"""Converts a model of some gigabytes from a hub on loopback with --drop-sources, killed again and again.

    python -m scripts.hub_streaming --folder DIR [--kills 20]

Makes the model, serves it, kills the conversion at random moments, and prints one line of JSON: what lay on
the disk of the sources at most, what was sent, and whether the bundle has the bytes of one from the local
folder.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from loopback_hub import LoopbackHub, Model  # noqa: E402

_CONVERT = "from krasis.convert.cli import main; main(prog_name='krasis-convert')"
_MODEL = {
    "--layers": 12,
    "--hidden": 1024,
    "--heads": 16,
    "--kv-heads": 4,
    "--head-dim": 64,
    "--experts": 64,
    "--top-k": 8,
    "--expert-intermediate": 512,
    "--vocab": 131072,
    "--shard-gib": 0.5,
}


class Watch(threading.Thread):
    """Samples what the sources take on the disk. most_bytes: the most that was seen."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most_bytes, self.ends = folder, 0, False

    def run(self) -> None:
        while not self.ends:
            self.most_bytes = max(self.most_bytes, _allocated(self.folder))
            time.sleep(0.02)


def _allocated(folder: Path) -> int:
    try:
        return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    except OSError:  # files come and go
        return 0


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _CONVERT, "--quiet", *arguments], env=environment)


def _killed(
    command: list[str], environment: dict[str, str], kills: int, rng: random.Random, usual_s: float
) -> int:
    """Runs until it ends by itself or was killed so often. How often it was killed."""
    for number in range(kills):
        process = _start(command, environment)
        try:
            if process.wait(rng.uniform(2.0, 2.0 + 3 * usual_s / kills)) == 0:
                return number
            raise SystemExit(f"the conversion failed with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if _start(command, environment).wait() != 0:
        raise SystemExit("the last conversion failed")
    return kills


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True)
@click.option("--kills", type=int, default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(folder: Path, kills: int, seed: int) -> None:
    """Does it in FOLDER, which needs about four times the model's size."""
    model, local, out = folder / "model", folder / "local.krasis", folder / "hub.krasis"
    if not model.exists():
        sizes = [str(word) for pair in _MODEL.items() for word in pair]
        make = [sys.executable, "-m", "scripts.models.make_random_model", *sizes, "--out", str(model)]
        subprocess.run(make, check=True, cwd=ROOT)
    begin = time.monotonic()
    if _start([str(model), "-o", str(local), "--force"], dict(os.environ)).wait() != 0:
        raise SystemExit("the local conversion failed")
    local_s = time.monotonic() - begin
    hub = LoopbackHub()
    hub.models["org/model"] = Model(model)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf")}
    watch = Watch(out.with_name(out.name + ".sources"))
    watch.start()
    command = ["org/model", "-o", str(out), "--drop-sources"]
    begin = time.monotonic()
    killed = _killed(command, environment, kills, random.Random(seed), local_s)
    streamed_s = time.monotonic() - begin
    watch.ends = True
    watch.join()
    names = sorted(path.name for path in local.iterdir())
    same = names == sorted(path.name for path in out.iterdir()) and all(
        filecmp.cmp(local / name, out / name, shallow=False) for name in names
    )
    result = {
        "model_bytes": sum(path.stat().st_size for path in model.iterdir()),
        "killed": killed,
        "most_source_bytes_on_disk": watch.most_bytes,
        "sent_bytes": hub.sent,
        "same_bytes": same,
        "local_s": round(local_s, 1),
        "streamed_s": round(streamed_s, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
