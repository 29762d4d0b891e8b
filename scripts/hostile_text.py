"""Tries every hostile chat template and tokenizer of the tests, and prints what they took.

    python -m scripts.hostile_text [--verbose]

Exits 1 if one took 2 s or more, 512 MB or more beyond what there was before, or raised what it must not.
"""

from __future__ import annotations

import sys
import traceback
from operator import attrgetter

from tests.hostile import test_text
from tests.hostile.support import text_trials

MAX_SECONDS, MAX_EXTRA_BYTES = 2.0, 512_000_000


def main() -> int:
    """Prints a line for each kind, and the worst."""
    is_bad = False
    for kind, files, trial in (
        ("templates", test_text.templates(), text_trials.try_template),
        ("tokenizers", test_text.tokenizers(), text_trials.try_tokenizer),
    ):
        done = []
        for name, source in files.items():
            try:
                result = trial(name, source)  # type: ignore[arg-type]  the two kinds differ
            except BaseException:  # noqa: BLE001  what escapes is what is looked for
                traceback.print_exc()
                print(f"ESCAPED {kind}: {name}")
                is_bad = True
                continue
            done.append(result)
            bad = result.seconds >= MAX_SECONDS or result.extra_bytes >= MAX_EXTRA_BYTES
            is_bad |= bad
            if bad or "--verbose" in sys.argv:
                print(f"{'BAD' if bad else 'ok '} {_figures(result)}  {result.name}: {result.sentence[:160]}")
        refused = sum(bool(one.sentence) for one in done)
        print(f"{len(files)} {kind}: {refused} refused, {len(done) - refused} harmless")
        for what in ("seconds", "cpu_seconds", "extra_bytes"):
            worst = max(done, key=attrgetter(what))
            print(f"  most {what}: {_figures(worst)}  {worst.name}")
    return int(is_bad)


def _figures(trial: text_trials.Trial) -> str:
    return f"{trial.seconds:5.2f} s {trial.cpu_seconds:5.2f} s CPU {trial.extra_bytes / 1e6:5.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
