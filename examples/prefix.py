"""Reads a long document once, saves what was computed, and answers questions about it later.

python examples/prefix.py model.krasis read report.txt report.kv
python examples/prefix.py model.krasis ask report.txt report.kv "What does it conclude?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from krasis.runtime import Engine


def main() -> None:
    """``read`` computes and saves the document; ``ask`` loads it and computes the question alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("action", choices=["read", "ask"])
    parser.add_argument("document", type=Path)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("question", nargs="?", default="")
    options = parser.parse_args()

    document = options.document.read_text()
    with Engine.open(options.bundle) as engine:
        if options.action == "read":
            engine.prefill(engine.encode(document))
            engine.save_prefix(options.prefix)  # the file appears complete or not at all
            print(f"saved {len(engine.tokens)} tokens")
            return
        # Only for the same bundle and KV precision; everything else is refused with a sentence.
        engine.load_prefix(options.prefix)
        tokens = [*engine.tokens, *engine.encode(f"\n\nQuestion: {options.question}\nAnswer:")]
        answer = engine.generate(tokens, max_tokens=100)
        print("".join(piece.text for piece in answer))
        print(f"[{answer.stats.num_cached_tokens} tokens came from the file]")


if __name__ == "__main__":
    main()
