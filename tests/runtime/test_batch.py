"""A batch says which rows belong to which sequence, and refuses what does not fit together."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Batch, Span, batch_of, one_sequence


def test_rows_and_wanted_logits_of_three_sequences() -> None:
    batch = batch_of([(4, 10, [1, 2, 3], "last"), (0, 0, [7, 8], "all"), (2, 5, [9], "none")])
    assert batch.tokens.tolist() == [1, 2, 3, 7, 8, 9]
    assert [(s.slot, s.first_row, s.end_row, s.start, s.end) for s in batch.spans] == [
        (4, 0, 3, 10, 13),
        (0, 3, 5, 0, 2),
        (2, 5, 6, 5, 6),
    ]
    assert (batch.num_logits, batch.wanted_rows()) == (3, [2, 3, 4])


def test_one_sequence() -> None:
    batch = one_sequence(np.arange(4), 3, "all")
    assert (batch.spans, batch.wanted_rows()) == ((Span(0, 0, 4, 3, "all"),), [0, 1, 2, 3])


@pytest.mark.parametrize(
    "spans",
    [
        (),
        (Span(0, 0, 2, 0),),
        (Span(0, 1, 3, 0),),
        (Span(0, 0, 3, -1),),
        (Span(0, 0, 0, 0), Span(1, 0, 3, 0)),
        (Span(0, 0, 1, 0), Span(0, 1, 2, 5)),
    ],
)
def test_spans_that_do_not_fit(spans: tuple[Span, ...]) -> None:
    with pytest.raises(NativeError):
        Batch(np.arange(3), spans)
