"""Latent attention on several ranks, which share halves of the cached rows as other models do keys and
values: the logits of one rank, also after decoded tokens, and from a saved prefix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rank_runs import computed_once, needs_double

from krasis.convert.cli import main as convert
from tests.support.tiny_checkpoints import tiny

pytest.importorskip("torch.distributed")
pytestmark = needs_double
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """What ``ranks_script.py`` computed on one rank and on two. No CPU experts: all ranks decode."""
    folder = tmp_path_factory.mktemp("latent")
    source, bundle = tiny("deepseek_v2", folder / "hf"), folder / "model.krasis"
    options = ["--gpu-group", "64", "--tiers", "gpu", "--quiet", "--force-text"]
    done = CliRunner().invoke(convert, [str(source), "-o", str(bundle), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: Path = computed_once(tmp_path_factory, "latent", [(str(bundle), [(1, None), (2, None)])], "ranks")
    return [dict(np.load(found / "0" / f"{size}.npz")) for size in (1, 2)]


@pytest.mark.parametrize("name", ["logits_1", "logits_9", "decoded_3", "second_turn", "edited_turn"])
def test_logits_of_one_rank(outcomes, relative_error, name: str) -> None:
    one, two = outcomes
    assert two["placement"][0].startswith("2 ranks: GPU")
    np.testing.assert_array_equal(two["greedy"], one["greedy"])
    assert relative_error(two[name], one[name]) < TOLERANCE


def test_ranks_load_a_prefix(outcomes, relative_error) -> None:
    one, two = outcomes
    assert relative_error(two["loaded_turn"], one["second_turn"]) < TOLERANCE
