"""Fuzzes one parser or all for a while; inputs that break it are kept in the corpus, where the tests replay
them.

python tests/fuzz/run.py --seconds 600 --parser gguf [--seed N] [--grow]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE / "support"), str(_HERE.parent / "formats" / "support")]

import fuzzing  # noqa: E402 -- after the path

MAX_KEPT_BYTES = 16 << 10


def keep(folder: Path, kind: str, data: bytes) -> Path:
    """Writes an input under a name made of its contents."""
    path = folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def main() -> int:
    """Returns 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each parser")
    parser.add_argument("--parser", choices=[*fuzzing.TARGETS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument(
        "--grow", action="store_true", help="also keep small inputs that gave a new kind of refusal"
    )
    arguments = parser.parse_args()
    is_broken = False
    for name, target in fuzzing.TARGETS.items():
        if arguments.parser not in (name, "all"):
            continue
        result = fuzzing.run(target, seed=arguments.seed, seconds=arguments.seconds)
        print(
            f"{name}: seed {arguments.seed}, {result.num_inputs} inputs, {result.num_accepted} accepted, "
            f"{len(result.sentences)} kinds of answer, {len(result.crashes)} crashes"
        )
        folder = fuzzing.CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for data, complaint in result.crashes:
            is_broken = True
            print(f"  {keep(folder, 'crash', data)}: {complaint}")
        if arguments.grow:
            for data in result.fresh:
                if len(data) <= MAX_KEPT_BYTES:
                    keep(folder, "kind", data)
    return int(is_broken)


if __name__ == "__main__":
    sys.exit(main())
