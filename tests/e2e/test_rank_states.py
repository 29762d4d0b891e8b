"""Linear attention and short convolutions on several ranks: each computes all tokens of such a layer, and
goes on from rank 0's state.

Logits are one rank's to TOLERANCE of their norm, see test_ranks.py.
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
LAYERS = {
    "qwen3_5_moe": {"num_hidden_layers": 3, "full_attention_interval": 3, "linear_conv_kernel_dim": 4},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
TOLERANCE = 1e-3


@pytest.mark.parametrize("family", ["qwen3_5_moe", "lfm2_moe", "kimi_linear"])
def test_states_are_those_of_one_rank(
    family: str, tmp_path: Path, relative_error: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    source = tiny(family, tmp_path / "hf", **LAYERS.get(family, {}))
    reporter, settings = Reporter(0), ConvertSettings(num_threads=1, gpu_group=64)
    convert(prepare([source], tmp_path / "b.krasis", settings, reporter), reporter)
    plan = [(str(tmp_path / "b.krasis"), [(1, None), (3, None)])]
    (folder := tmp_path / "states").mkdir()
    done = run_script("states", folder, json.dumps(plan))
    assert done.returncode == 0, done.stdout + done.stderr
    one, three = (np.load(path) for path in sorted(folder.rglob("*.npz")))
    assert one["kept"] == three["kept"] == BORDER
    for name in ("prompt", "short", "decoded", "turn", "edited", "loaded"):
        assert relative_error(three[name], one[name]) <= TOLERANCE, name
