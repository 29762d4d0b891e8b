"""schemathesis against a scripted server: whatever /openapi.json describes, nothing is answered 5xx.

    python -m scripts.outside.openapi_fuzz

It fetches schemathesis, pinned, into a virtual environment in the cache folder (``--venv`` names another).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from scripts.outside.surroundings import cache_folder, fetched, scripted_server

VERSION = "schemathesis==4.32.5"


@click.command()
@click.option("--venv", "folder", type=click.Path(path_type=Path))
@click.option("--program", type=click.Path(path_type=Path, exists=True), help="A schemathesis that is there.")
@click.option("--examples", type=int, default=50, show_default=True, help="Requests of each kind.")
def main(folder: Path | None, program: Path | None, examples: int) -> None:
    """Run it. The exit code is schemathesis's: 0 if no answer was 5xx."""
    if program is None:
        program = fetched(folder or cache_folder() / "schemathesis", VERSION) / "schemathesis"
    with scripted_server() as port:
        command = [str(program), "run", f"http://127.0.0.1:{port}/openapi.json"]
        command += ["--checks", "not_a_server_error", "--phases", "fuzzing", "--workers", "1"]
        done = subprocess.run([*command, "--max-examples", str(examples)], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
