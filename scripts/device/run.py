#!/usr/bin/env python3
"""The command; see ``cli``. From the repository root: ``python -m scripts.device.run --help``."""

from scripts.device.cli import main

if __name__ == "__main__":
    main()
