"""Plans of the lent machines are near what these measured, and the document says how near."""

from __future__ import annotations

from scripts import planned_and_measured


def test_plans_are_near_what_was_measured() -> None:
    known, unseen = planned_and_measured.rows()
    assert (len(known), len(unseen)) == (34, 6)
    assert {row.what for row in unseen} == {"prefill", "decode"}
    assert {row.what.partition(",")[0] for row in known} == {"prefill", "decode", "first token"}
    far = [
        [row for row in rows if abs(row.deviation) > planned_and_measured.LIMIT] for rows in (known, unseen)
    ]
    assert [row.what for row in far[0]] == ["first token, s (one run)"], [row.line() for row in far[0]]
    document = (planned_and_measured.ROOT / "docs" / "PLANNING.md").read_text("utf-8")
    renew = "python -m scripts.planned_and_measured"
    assert planned_and_measured.table(known) in document, renew
    marks = planned_and_measured.UNSEEN_BEGIN, planned_and_measured.UNSEEN_END
    assert planned_and_measured.table(unseen, *marks) in document, renew
    assert not far[1], [row.line() for row in far[1]]
