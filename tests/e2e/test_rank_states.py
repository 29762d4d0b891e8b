"""Linear attention on several ranks: each computes all tokens of such a layer, and goes on from rank 0's
state.

Ranks differ from one rank by the rounding of partial sums, see test_ranks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rank_runs import needs_double, run_script
from rank_states import BORDER

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from tests.support.tiny_checkpoints import tiny

pytest.importorskip("torch.distributed")

pytestmark = needs_double
TOLERANCE = 2e-3
INT8_TOLERANCE = 3e-2  # where three ranks decoded, on the CPU's experts: one has all of them in VRAM


def test_states_are_those_of_one_rank(
    tmp_path: Path, relative_error: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    layers = {"num_hidden_layers": 3, "full_attention_interval": 3, "linear_conv_kernel_dim": 4}
    source = tiny("qwen3_5_moe", tmp_path / "hf", **layers)
    reporter, settings = Reporter(0), ConvertSettings(num_threads=1, gpu_group=64)
    convert(prepare([source], tmp_path / "b.krasis", settings, reporter), reporter)
    plan = [(str(tmp_path / "b.krasis"), [(1, None), (3, None)])]
    (folder := tmp_path / "states").mkdir()
    done = run_script("states", folder, json.dumps(plan))
    assert done.returncode == 0, done.stdout + done.stderr
    one, three = (np.load(path) for path in sorted(folder.rglob("*.npz")))
    assert one["kept"] == three["kept"] == BORDER
    for name in ("prompt", "short", "decoded", "turn", "edited", "loaded"):
        limit = INT8_TOLERANCE if name == "decoded" else TOLERANCE
        assert relative_error(three[name], one[name]) <= limit, name
