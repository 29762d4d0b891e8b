"""What the checks with outside programs need around them."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where programs that were fetched stay."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "krasis-outside"


@contextmanager
def scripted_server(*options: str) -> Iterator[int]:
    """The port of a scripted server in another process."""
    command = [sys.executable, "-m", "scripts.outside.scripted_server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline() if process.stdout else "")
        finally:
            process.terminate()
            process.wait(20)


def fetched(folder: Path, *requirements: str) -> Path:
    """The folder of the programs of a virtual environment that has requirements."""
    bin_folder = folder / "bin"
    if not (bin_folder / "python").exists():
        venv.create(folder, with_pip=True)
    command = [str(bin_folder / "python"), "-m", "pip", "install", "-q", *requirements]
    subprocess.run(command, check=True)
    return bin_folder
