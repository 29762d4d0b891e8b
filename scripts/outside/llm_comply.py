"""llm-comply's checks of the strict form of answers, on all three APIs: everything but images must pass.

    python -m scripts.outside.llm_comply

It fetches llm-comply, pinned, into a virtual environment in the cache folder (``--venv`` names another), and
asks a scripted server, under a name that lets the checks of reasoning run too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from scripts.outside.surroundings import cache_folder, fetched, scripted_server

VERSION = "llm-comply==0.5.0"
MODEL = "gpt-5-claude-opus"
FORMATS = {"openai-chat": "/v1", "open-responses": "/v1", "anthropic": ""}
IMAGES = "image"  # in the ids of the checks that a model of text cannot pass


def check(program: Path, form: str, url: str) -> tuple[list[str], list[str]]:
    """(what passed, what failed) of one API."""
    command = [str(program), "--json", "--format", form, "-u", url, "-m", MODEL, "-k", "any"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    results: list[Any] = json.loads(done.stdout)["results"]
    passed = [one["id"] for one in results if one["status"] in ("passed", "warning")]
    failed = [
        f"{one['id']}: {one['status']}, {one.get('errors')}" for one in results if one["id"] not in passed
    ]
    return passed, failed


@click.command()
@click.option("--venv", "folder", type=click.Path(path_type=Path))
@click.option("--program", type=click.Path(path_type=Path, exists=True), help="An llm-comply that is there.")
def main(folder: Path | None, program: Path | None) -> None:
    """Run the checks. Exit code 1 if one other than those of images fails."""
    if program is None:
        program = fetched(folder or cache_folder() / "llm-comply", VERSION) / "llm-comply"
    all_failed: list[str] = []
    with scripted_server("--strict") as port:
        for form, path in FORMATS.items():
            passed, failed = check(program, form, f"http://127.0.0.1:{port}{path}")
            click.echo(f"{form}: {len(passed)} of {len(passed) + len(failed)}")
            all_failed += [f"{form}: {one}" for one in failed]
    click.echo("\n".join(all_failed))
    sys.exit(any(IMAGES not in one.partition(": ")[2].partition(":")[0] for one in all_failed))


if __name__ == "__main__":
    main()
