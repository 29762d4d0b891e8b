"""Finds the fuzzer's modules and the builders of sound files."""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "formats" / "support"), str(_TESTS / "fuzz" / "support")]
