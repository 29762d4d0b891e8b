"""Expert formats by id and by the names users give, and what each says of itself."""

from __future__ import annotations

import pytest

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import CPU_FORMATS, GPU_FORMATS, MarlinLayout, expert_format, find_expert_format

FORMATS = [
    *CPU_FORMATS.values(),
    *(make(4, 64, "F16") for make in GPU_FORMATS.values()),
    MarlinLayout(8, None),
]


@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.layout_id)
def test_a_format_is_found_by_its_id_for_its_tier_alone(layout) -> None:
    assert expert_format(layout.layout_id, layout.tier) == layout
    other = "gpu" if layout.tier == "cpu" else "cpu"
    with pytest.raises(FormatError, match=f"unexpected layout of the {other} experts"):
        expert_format(layout.layout_id, other)


def test_other_ids_are_no_expert_formats() -> None:
    for layout_id in ("plain", "int8-rows-r32k4"):
        assert find_expert_format(layout_id) is None
        with pytest.raises(FormatError, match="not a layout of experts"):
            expert_format(layout_id)
    with pytest.raises(FormatError, match="unknown layout"):
        expert_format("cpu-q9-r32-b32")


def test_what_is_packed_as_it_lies() -> None:
    kept = {name: CPU_FORMATS[name].accepts("Q8_0") for name in ("q8", "int4")}
    assert kept == {"q8": "as is", "int4": "decoded"}
    for layout in FORMATS:
        assert [layout.accepts(dtype) for dtype in ("F32", "BF16", "F16")] == ["as is"] * 3
        assert layout.accepts("Q4_K") == "decoded"
    assert MarlinLayout().accepts("Q8_0") == "decoded"


def test_kernels_there_are() -> None:
    assert MarlinLayout(4).backends == {"gpu"}
    assert MarlinLayout(8).backends == set()
    assert all(layout.backends == {"cpu"} for layout in CPU_FORMATS.values())


@pytest.mark.parametrize(
    ("group", "sizes", "fitted"),
    [
        (128, (2048, 768), 128),
        (128, (2880, 2880), 64),  # gpt-oss
        (128, (2048, 96), 32),
        (64, (2048, 768), 64),
        (None, (2880, 100), None),
    ],
)
def test_the_largest_group_that_divides(group, sizes, fitted) -> None:
    assert MarlinLayout(4, group).fitted(iter(sizes)) == MarlinLayout(4, fitted)


def test_sizes_without_a_group_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no scale group divides.*got 100"):
        MarlinLayout().fitted((2048, 100))
