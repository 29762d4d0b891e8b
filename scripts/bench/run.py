#!/usr/bin/env python3
"""The command; see ``cli``. Runs from anywhere: ``python scripts/bench/run.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cli import main

if __name__ == "__main__":
    main()
