"""One part of rows that are kept is read and written in place, whatever their type; the others stay."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.runtime.state.row_form import RowForm


@pytest.mark.parametrize(("dtype", "limit"), [("f32", 0), ("f16", 1e-3), ("int8", 0.02)])
def test_parts_of_rows(dtype: str, limit: float) -> None:
    random = np.random.default_rng(3)
    form = RowForm((8, 16, 4), dtype)
    given = random.standard_normal((12, 28), dtype=np.float32)
    rows = form.kept(given)
    for number, part in enumerate(np.split(given, (8, 24), axis=1)):
        assert np.abs(form.part(rows, number) - part).max() <= limit
    before = rows.copy()
    new = 5 * random.standard_normal((4, 16), dtype=np.float32)
    form.put_part(rows[2::3], 1, new)  # every third row, as entries lie
    assert np.abs(form.part(rows, 1)[2::3] - new).max() <= 5 * limit
    for number in (0, 2):
        np.testing.assert_array_equal(form.part(rows, number), form.part(before, number))
    others = [row for row in range(12) if row % 3 != 2]
    np.testing.assert_array_equal(rows[others], before[others])
    np.testing.assert_array_equal(form.floats(rows)[:, 8:24].astype(np.float32), form.part(rows, 1))
