"""How much the INT4 search loses, against a float64 search over every scale worth trying."""

from __future__ import annotations

import numpy as np
import pytest


def brute_force(weights: np.ndarray, group: int, importance: np.ndarray | None = None) -> float:
    """The least squared error over 500 magnitudes and both signs, scales unrounded, all in float64."""
    w = weights.astype(np.float64).reshape(-1, group)
    factor = (
        np.ones_like(w) if importance is None else np.tile(importance.reshape(-1, group), (len(weights), 1))
    )
    absmax = np.abs(w).max(axis=1)
    best = np.full(len(w), np.inf)
    for divisor in np.geomspace(4, 60, 500):
        for sign in (1, -1):
            scale = (sign * absmax / divisor)[:, None]
            error = (factor * (w - np.clip(np.rint(w / scale), -8, 7) * scale) ** 2).sum(axis=1)
            best = np.minimum(best, error)
    return float(best.sum())


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t3"])
@pytest.mark.parametrize(("group", "allowed"), [(32, 1.006), (64, 1.006), (128, 1.006), (512, 1.01)])
def test_error_is_close_to_the_best_possible(pool, view, weights, marlin, kind, group, allowed):
    matrix = view(weights(128, 512, kind, seed=11))
    *_, stats = marlin(pool, matrix, 4, group, "BF16")
    assert stats.squared_error < allowed * brute_force(matrix.to_float32(), group)


@pytest.mark.parametrize(
    ("group", "published"), [(32, 0.0066), (64, 0.0081), (128, 0.0094)], ids=["g32", "g64", "g128"]
)
def test_gaussian_weights_meet_the_figures_of_the_design(pool, view, weights, marlin, group, published):
    *_, stats = marlin(pool, view(weights(256, 2048)), 4, group, "BF16")
    assert stats.relative_mse == pytest.approx(published, rel=0.015)


def test_both_signs_beat_one(pool, view, marlin, weights):
    """Skewed groups, whose extreme is positive, need the negative scale: -8 levels reach further than 7."""
    skewed = np.abs(weights(64, 128)) - np.float32(0.01)
    *_, stats = marlin(pool, view(skewed), 4, 128, "BF16")
    _, scales, _ = marlin(pool, view(skewed), 4, 128, "BF16")
    assert (scales >> 15 == 1).all()
    mirrored = marlin(pool, view(-skewed), 4, 128, "BF16")
    assert (mirrored[1] >> 15 == 0).all()
    assert mirrored[2].squared_error == pytest.approx(stats.squared_error, rel=1e-6)


@pytest.mark.parametrize("group", [128, 512])
def test_importance_is_what_is_minimised(pool, view, weights, marlin, group):
    from krasis.formats.layouts import MarlinLayout

    matrix = view(weights(64, 512, "t3", seed=2))
    importance = np.random.default_rng(8).lognormal(0, 1.5, 512).astype(np.float32)

    def weighted_error(**more):
        words, scales, _ = marlin(pool, matrix, 4, group, "BF16", **more)
        found = MarlinLayout(4, None if group == 512 else group).dequantize(words, scales).T
        return ((found - matrix.to_float32()).astype(np.float64) ** 2 * importance).sum()

    with_importance = weighted_error(importance=importance)
    assert with_importance < 0.97 * weighted_error()
    assert with_importance < 1.01 * brute_force(matrix.to_float32(), group, importance)
    uniform = weighted_error(importance=np.full(512, 3, np.float32))
    assert uniform == pytest.approx(weighted_error(), rel=0.01)


def test_int4_of_dequantised_int4_is_itself(pool, view, weights, marlin):
    """Codes that reach -8 or 7 come back exactly: a second conversion loses nothing."""
    from krasis.formats.layouts import MarlinLayout

    layout = MarlinLayout(4, 128)
    first, scales, _ = marlin(pool, view(weights(64, 512)), 4, 128, "BF16")
    values = layout.dequantize(first, scales)
    again, again_scales, stats = marlin(pool, view(values.T, "F32"), 4, 128, "BF16")
    np.testing.assert_array_equal(layout.dequantize(again, again_scales), values)
    assert stats.squared_error == 0
