"""Windows count every token once; the loss is cross entropy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def perplexity() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "perplexity.py"
    spec = importlib.util.spec_from_file_location("perplexity_script", path)
    if spec is None or spec.loader is None:
        pytest.fail("the script cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@given(st.integers(0, 300), st.integers(2, 64), st.integers(1, 64))
@settings(max_examples=300, deadline=None)
def test_every_token_but_the_first_is_counted_once(
    perplexity: ModuleType, count: int, context: int, stride: int
) -> None:
    tokens, stride = list(range(count)), min(stride, context - 1)
    counted: list[int] = []
    for window in perplexity.windows(tokens, context, stride):
        assert 1 <= window.first_target < len(window.tokens) <= context
        counted += window.tokens[window.first_target :]
    assert counted == tokens[1:]


def test_the_loss_is_cross_entropy(perplexity: ModuleType) -> None:
    import torch

    logits = np.random.default_rng(0).normal(0, 5, (20, 50)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 50, 20).tolist()
    loss, count = perplexity.negative_log_likelihood(logits, perplexity.Window(tokens, 8))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[7:-1]), torch.tensor(tokens[8:]), reduction="sum"
    )
    assert count == 12
    assert loss == pytest.approx(float(expected), rel=1e-5)
