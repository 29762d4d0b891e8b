"""Decoding with guesses by a bundle's layer for multi-token prediction and without, in turns in one process.

    python -m scripts.bench_drafting model.krasis --draft 1 --rounds 3 --tokens 128 --prompt "Write a story."

Prints one JSON object: tokens a second of each way (the median round), their ratio, how many guesses were
right, and what the planner expects of the bundle. The text is the same both ways, or the script fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from krasis.runtime import Engine, EngineSettings, SamplingSettings
from krasis.runtime.generation import Generation
from krasis.runtime.planning.drafting import draft_gain
from krasis.runtime.planning.sizes import sizes_of_bundle

PROMPT = "Explain step by step how a bicycle stays upright, and list the parts that matter."


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draft", type=int, default=1, help="guesses a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--ctx", type=int, default=None)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    settings = EngineSettings(device="cpu", context=options.ctx, threads=options.threads, draft=options.draft)
    with Engine.open(options.bundle, settings) as engine:
        engine.wait_until_read()
        print(json.dumps(measure(engine, options), indent=2))


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, object]:
    """Both ways in turns, after one round of each that does not count."""
    backend = engine._held.backend
    drafter = getattr(backend, "drafter")  # noqa: B009 -- backends may have none
    rates: dict[str, list[float]] = {"plain": [], "drafted": []}
    texts: set[tuple[int, ...]] = set()
    last = Generation()
    for number in range(options.rounds + 1):
        for way, one in (("plain", None), ("drafted", drafter)):
            backend.drafter = one  # type: ignore[attr-defined]
            found = answer(engine, options)
            texts.add(tuple(found.tokens))
            if number:
                rates[way].append(found.decode_tokens_per_s)
            last = found
    if len(texts) != 1:
        raise SystemExit("the text with guesses is another than without")
    plain, drafted = (statistics.median(rates[way]) for way in ("plain", "drafted"))
    return {
        "tokens": len(last.tokens),
        "plain_tokens_per_s": plain,
        "drafted_tokens_per_s": drafted,
        "ratio": drafted / plain if plain else 0.0,
        "rounds": rates,
        "num_drafted": last.drafts.num_drafted,
        "num_accepted": last.drafts.num_accepted,
        "expected_gain": draft_gain(sizes_of_bundle(engine.bundle.manifest), options.draft),
    }


def answer(engine: Engine, options: argparse.Namespace) -> Generation:
    """One answer from an empty cache; a prompt that the drafter followed, too."""
    engine.reset()
    sampling = SamplingSettings(temperature=options.temperature, seed=1)
    found = engine.generate(options.prompt, sampling, max_tokens=options.tokens)
    for _ in found:
        pass
    return found.stats


if __name__ == "__main__":
    main()
