"""A chat that keeps its history and shows what the model thinks apart from what it answers.

python examples/chat.py model.krasis
"""

from __future__ import annotations

import argparse
import sys

from krasis.runtime import Engine, EngineSettings


def main() -> None:
    """Reads questions from stdin, one a line, until it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--context", type=int, help="tokens; by default what memory has room for")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()

    messages: list[dict[str, str]] = []
    with Engine.open(options.bundle, EngineSettings(context=options.context)) as engine:
        for question in sys.stdin:
            messages.append({"role": "user", "content": question.strip()})
            # The whole conversation is passed each time; what the cache holds of it is not computed again.
            answer = engine.generate(messages, max_tokens=options.max_tokens)
            for piece in answer:
                stream = sys.stdout if piece.kind == "answer" else sys.stderr
                print(piece.text, end="", flush=True, file=stream)
            stats = answer.stats
            print(f"\n[{stats.num_cached_tokens} of {stats.num_prompt_tokens} prompt tokens were cached]")
            # Thinking is left out of the history, as chat templates expect it.
            messages.append({"role": "assistant", "content": stats.text})


if __name__ == "__main__":
    main()
