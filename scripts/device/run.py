#!/usr/bin/env python3
"""The command; see ``cli``. Runs from anywhere: ``python scripts/device/run.py --help``."""

import sys
from pathlib import Path

# In the place of this folder, whose module names would hide others.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from device.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
