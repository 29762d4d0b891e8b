"""What a built wheel and sdist must hold: the library, no tests, typed packages, commands, no dead links.

python -m scripts.check_wheel dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

LIBRARY = "krasis/_lib/libkrasis_cpu.so"
COMMANDS = ("krasis", "krasis-convert", "krasis-info", "krasis-run", "krasis-serve")
TYPED = ("krasis/formats/py.typed", "krasis/convert/py.typed", "krasis/runtime/py.typed")
IN_SDIST = (
    "README.md",
    "LICENSE",
    "scripts/quickstart.sh",
    "tests/assets/tiny-qwen3-moe/model-00001-of-00002.safetensors",
)
_LINK = re.compile(r"\]\(([^)]+)\)")
_TAG = re.compile(r"-py3-none-(manylinux_\d+_\d+_x86_64|linux_x86_64)(\.manylinux\w+)*\.whl")


def wheel_problems(path: Path) -> Iterator[str]:
    """What is wrong with a wheel, a sentence each."""
    if not _TAG.search(path.name):
        yield f"{path.name}: not a wheel for every Python on Linux"
    if "-linux_x86_64" in path.name:
        yield f"{path.name}: not audited: its name says linux, not manylinux"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = next((name for name in names if name.endswith(".dist-info/METADATA")), None)
        entries = next((name for name in names if name.endswith(".dist-info/entry_points.txt")), None)
        if metadata is None or entries is None:
            yield f"{path.name}: no metadata"
            return
        about = message_from_string(wheel.read(metadata).decode())
        scripts = wheel.read(entries).decode()
    yield from (f"{path.name}: {name} is missing" for name in (LIBRARY, *TYPED) if name not in names)
    strays = sorted({name.split("/")[0] for name in names} - {"krasis"})
    yield from (
        f"{path.name}: {name} does not belong there"
        for name in strays
        if not name.startswith("krasis_bundle")
    )
    yield from (f"{path.name}: no command {one}" for one in COMMANDS if f"{one} = " not in scripts)
    yield from _metadata_problems(path.name, about)


def _metadata_problems(where: str, about: Message) -> Iterator[str]:
    text = str(about.get_payload())
    for link in _LINK.findall(text):
        if not link.startswith(("https://", "http://", "#")):
            yield f"{where}: an index cannot follow the link {link}"
    for field in ("Summary", "License-Expression", "Requires-Python", "Classifier", "Keywords"):
        if about.get(field) is None:
            yield f"{where}: no {field} in its metadata"


def sdist_problems(path: Path) -> Iterator[str]:
    """What is wrong with a source distribution."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    yield from (f"{path.name}: {name} is missing" for name in IN_SDIST if name not in names)


def main(paths: list[str]) -> int:
    """Prints what is wrong. The exit code."""
    problems = []
    for path in map(Path, paths):
        check = wheel_problems if path.suffix == ".whl" else sdist_problems
        problems += check(path)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
