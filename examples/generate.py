"""Answers one question as the text arrives, and stops after a number of seconds.

python examples/generate.py model.krasis "Why is the sky blue?" [--seconds 10]
"""

from __future__ import annotations

import argparse
import threading

from krasis.runtime import Engine, SamplingSettings


def main() -> None:
    """Streams the answer to stdout; a timer in another thread may cancel it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()

    with Engine.open(options.bundle) as engine:
        answer = engine.generate(
            [{"role": "user", "content": options.question}],
            SamplingSettings(temperature=0.7, top_p=0.8, seed=1),
            max_tokens=options.max_tokens,
        )
        # Answer.cancel may be called from any thread, callback or signal handler. It does not wait.
        timer = threading.Timer(options.seconds, answer.cancel)
        timer.start()
        try:
            for piece in answer:
                if piece.kind == "answer":  # "reasoning" is what the model thinks first
                    print(piece.text, end="", flush=True)
        finally:
            timer.cancel()
        print(f"\n[{answer.stats.stop_reason}: {len(answer.stats.tokens)} tokens]")


if __name__ == "__main__":
    main()
