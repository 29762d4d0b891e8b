#!/usr/bin/env python3
"""The command; see ``cli``. From the repository root: ``python -m scripts.bench.run --help``."""

from scripts.bench.cli import main

if __name__ == "__main__":
    main()
