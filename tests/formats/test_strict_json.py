import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError
from krasis.formats.strict_json import parse_json, parse_json_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 0, 3]))
@settings(max_examples=150, deadline=None)
def test_whatever_json_writes_is_read_back(value, ascii_only, indent):
    try:
        data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:
        return
    assert parse_json(data, "x", max_bytes=1 << 20) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"x": {"b": 1, "b": 1}}', "'b' occurs twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "too large"),
        ("[18446744073709551616]", "exceeds 64 bits"),
        ("[-9223372036854775809]", "exceeds 64 bits"),
        ("[" + "9" * 5000 + "]", "5000 digits"),
        ("[" * 33 + "]" * 33, "nested too deeply"),
        ('["\\ud800"]', "lone surrogate"),
        ('{"\\udc00x": 1}', "lone surrogate"),
        ("[1,]", "not valid JSON"),
        ('{"a": 1', "not valid JSON"),
        ('"abc', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1] x", "not valid JSON"),
    ],
)
def test_refusals(text, complaint):
    with pytest.raises(FormatError, match=complaint) as caught:
        parse_json(text.encode(), "file.json", max_bytes=1 << 20)
    assert str(caught.value).startswith("file.json: ")


def test_brackets_inside_strings_are_no_nesting():
    text = json.dumps({"template": "[" * 1000 + '\\"{' * 1000})
    assert parse_json(text.encode(), "x", max_bytes=1 << 20) == json.loads(text)


def test_bytes_that_are_not_utf8():
    with pytest.raises(FormatError, match=r"UTF-8.*byte at 2"):
        parse_json(b'["\xff"]', "x", max_bytes=100)


def test_length_and_kind():
    with pytest.raises(FormatError, match="too long"):
        parse_json(b"[1, 2]", "x", max_bytes=5)
    with pytest.raises(FormatError, match=r"must be an object.*list"):
        parse_json_object(b"[]", "x", max_bytes=5)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 5_000_000,
        b"[]," * 1_500_000,
        b'{"a' + b" " * 5_000_000,
        b'"' + b'\\"' * 2_500_000,
        b'"\\' * 2_500_000,
        b"{}" + b" " * 5_000_000 + b"x",
    ],
    ids=["deep", "wide", "open string", "escapes", "backslashes", "spaces"],
)
def test_refusing_takes_linear_time(data):
    start = time.process_time()
    with pytest.raises(FormatError):
        parse_json(data, "x", max_bytes=1 << 30)
    assert time.process_time() - start < 5  # a quadratic scan would need hours


@pytest.mark.parametrize(
    "end", [b"", b" ", b"\n", b" " * 65536, b" " * (3 << 20), b"\t\n" * 70_000, b" \r" * 99]
)
@pytest.mark.parametrize("make", [bytes, memoryview])
def test_white_space_at_the_end_is_no_part_of_it(make, end):
    text = b' {"a": ["x  "]}' + end
    assert parse_json(make(text), "x", max_bytes=1 << 23) == {"a": ["x  "]}
    with pytest.raises(FormatError, match="at byte 15"):
        parse_json(make(text[:15] + b"!" + end), "x", max_bytes=1 << 23)
    with pytest.raises(FormatError, match="too long"):
        parse_json(make(text), "x", max_bytes=len(text) - 1)


def test_nothing_but_white_space_is_no_json():
    for text in (b"", b" ", b" " * 200_000):
        with pytest.raises(FormatError, match="not valid JSON"):
            parse_json(text, "x", max_bytes=1 << 20)
