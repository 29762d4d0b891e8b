"""Types of other programs are called by their names."""

from __future__ import annotations

import pytest

from krasis.formats.checkpoints.foreign_ggml_types import IK_TYPES, REMOVED_TYPES, explain_type
from krasis.formats.checkpoints.ggml_blocks import TYPE_NAMES


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (36, "I2_S"),
        (133, "Q6_0"),
        (137, "IQ2_K"),
        (144, "IQ4_KS"),
        (152, "IQ5_KS"),
        (157, "IQ2_KL"),
        (158, "IQ1_KT"),
    ],
)
def test_types_of_ik_llama_cpp(number: int, name: str) -> None:
    what, hint = explain_type(number)
    assert f"type {name} is ik_llama.cpp's own" in what
    assert "another quantisation" in hint
    assert "BF16" in hint


@pytest.mark.parametrize(
    ("number", "name"), [(208, "Q8_0_R8"), (230, "BF16_R16"), (340, "IQ5_K_R4"), (399, "Q8_K_R8")]
)
def test_repacked_types_say_so(number: int, name: str) -> None:
    assert f"type {name} is ik_llama.cpp's own, repacked for one kind of CPU" in explain_type(number)[0]


@pytest.mark.parametrize(("number", "name"), [(4, "Q4_2"), (31, "Q4_0_4_4"), (38, "IQ4_NL_8_8")])
def test_removed_types(number: int, name: str) -> None:
    assert f"type {name} was removed from llama.cpp" in explain_type(number)[0]


def test_types_that_nothing_decodes_yet() -> None:
    what, hint = explain_type(42)
    assert "type Q2_0 is llama.cpp's, but nothing here decodes it" in what
    assert "Q8_0" in hint


def test_newer_and_impossible_numbers() -> None:
    assert "pip install -U gguf" in explain_type(60)[1]
    assert "another program or damaged" in explain_type(2**31)[1]


def test_the_tables_do_not_overlap_what_is_read() -> None:
    assert not set(IK_TYPES) & set(REMOVED_TYPES)
    assert not set(TYPE_NAMES) & (set(IK_TYPES) | set(REMOVED_TYPES))
    assert len(IK_TYPES) == 60
