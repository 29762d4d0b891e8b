"""Thinking and answer apart, however the text arrives, and markers that decoding leaves out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.runtime.text.thinking import (
    Format,
    MarkedStream,
    Segment,
    ThinkingSplitter,
    find_formats,
    marker_tokens,
    opened_by,
)
from krasis.runtime.text.tokenizer import Tokenizer

THINK = Format("<think>", ("</think>",))
CHANNEL = Format("<|channel>thought", ("<channel|>",), anywhere=True)
HARMONY = Format(
    "<|channel|>analysis<|message|>",
    ("<|end|>", "<|channel|>final<|message|>"),
    ("<|start|>assistant", "<|channel|>final<|message|>"),
    anywhere=True,
)


def parted(
    text: str, formats: tuple[Format, ...] = (THINK,), opened: Format | None = None, size: int = 1
) -> list[tuple[str, str]]:
    """(kind, text), neighbours of a kind joined."""
    splitter = ThinkingSplitter(formats, opened)
    segments: list[Segment] = []
    for at in range(0, len(text), size):
        segments += splitter.push(text[at : at + size])
    joined: list[tuple[str, str]] = []
    for kind, part in [*segments, *splitter.finish()]:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + part)
        else:
            joined.append((kind, part))
    return joined


def thought(text: str) -> tuple[str, str]:
    return ("reasoning", text)


def said(text: str) -> tuple[str, str]:
    return ("answer", text)


CASES = [
    ("<think>\nhm, \n\nso\n</think>\n\nHi", (THINK,), None, [thought("hm, \n\nso"), said("Hi")]),
    ("hm</think>\n\nHi \n", (THINK,), THINK, [thought("hm"), said("Hi \n")]),
    ("\n\n Hi", (THINK,), None, [said("\n\n Hi")]),
    ("   ", (THINK,), None, [said("   ")]),
    ("", (THINK,), None, []),
    ("", (THINK,), THINK, []),
    # A marker later in an answer is text: an answer about templates has some.
    ("Use <think> and </think>.", (THINK,), None, [said("Use <think> and </think>.")]),
    ("<think>a</think>b <think>c</think>", (THINK,), None, [thought("a"), said("b <think>c</think>")]),
    # Opened by the prompt and once more by the model.
    ("<think>\na</think>b", (THINK,), THINK, [thought("a"), said("b")]),
    ("\n<thinner</think>b", (THINK,), THINK, [thought("<thinner"), said("b")]),
    # Empty thinking, an end that nothing opened, a second round, no end at all, half a marker.
    ("<think>\n\n</think>\n\nb", (THINK,), None, [said("b")]),
    ("</think>\n\nb", (THINK,), None, [said("b")]),
    ("<think>a</think>\n<think>b</think>c", (THINK,), None, [thought("ab"), said("c")]),
    ("<think>a\n b ", (THINK,), None, [thought("a\n b")]),
    ("<think>a</thi", (THINK,), None, [thought("a</thi")]),
    ("<thi", (THINK,), None, [said("<thi")]),
    ("<thing>", (THINK,), None, [said("<thing>")]),
    # Markers of special tokens count anywhere.
    (
        "<|channel>thought\na\n<channel|>b<|channel>thought c<channel|> d",
        (THINK, CHANNEL),
        None,
        [thought("a"), said("b"), thought("c"), said("d")],
    ),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        (THINK, HARMONY),
        None,
        [thought("a"), said("b")],
    ),
    (
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>b",
        (HARMONY,),
        None,
        [thought("a"), said("b")],
    ),
    ("<|channel|>final<|message|>b", (HARMONY,), None, [said("b")]),
    ("<think>a</think>b", (), None, [said("<think>a</think>b")]),
]


@pytest.mark.parametrize(("text", "formats", "opened", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_parts(
    text: str,
    formats: tuple[Format, ...],
    opened: Format | None,
    expected: list[tuple[str, str]],
    size: int,
) -> None:
    assert parted(text, formats, opened, size) == expected


PIECES = st.sampled_from(["<think>", "</think>", "<", "th", "ink>", " ", "\n", "a", "<|channel>thought"])


@given(st.lists(PIECES, max_size=14).map("".join), st.booleans(), st.integers(2, 9))
@settings(max_examples=300, deadline=None)
def test_it_does_not_matter_how_text_arrives(text: str, is_open: bool, size: int) -> None:
    opened = THINK if is_open else None
    whole = parted(text, (THINK, CHANNEL), opened, 10_000)
    assert parted(text, (THINK, CHANNEL), opened, size) == whole
    assert parted(text, (THINK, CHANNEL), opened, 1) == whole
    # Nothing is invented: all that is shown was there, in this order.
    rest = text
    for _, part in whole:
        for char in part:
            at = rest.find(char)
            assert at >= 0
            rest = rest[at + 1 :]


WRAPPED = Format("<think>", ("</think>",), ("<answer>",), wraps=("<answer>", "</answer>"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nHm.\n</think>\n<answer>\nYes. \n</answer>\n", "Yes."),
        ("<think>Hm.</think><answer>Yes.</answer>", "Yes."),
        ("<think>Hm.</think>\n<answer>\n</answer> is a tag.\n</answer>", "</answer> is a tag."),
        ("<think>Hm.</think>\n<answer>\nYes, </answ", "Yes, </answ"),
        ("<think>Hm.</think>\nYes.\n\n", "Yes.\n\n"),
    ],
)
def test_what_stands_around_an_answer_is_none_of_it(text: str, answer: str) -> None:
    """As Hunyuan-A13B and ERNIE 4.5 write."""
    for size in (1, 2, 3, 5, 8, 1000):
        assert parted(text, (THINK, WRAPPED), None, size) == [("reasoning", "Hm."), ("answer", answer)]
    assert parted("The tag </answer>", (THINK, WRAPPED), None, 3) == [("answer", "The tag </answer>")]


def test_text_that_is_certain_is_not_held_back() -> None:
    splitter = ThinkingSplitter((THINK,))
    assert splitter.push("<think>\nso ") == [Segment("reasoning", "so")]
    assert splitter.push("it is<") == [Segment("reasoning", " it is")]
    assert splitter.push("/think>") == []
    assert splitter.push("\n\nYes < no") == [Segment("answer", "Yes < no")]


@pytest.fixture(scope="module")
def special(tokenizer_json: bytes) -> Tokenizer:
    """The tests' tokenizer with thinking tokens: <think> is text, [THINK] is a control token."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_str(tokenizer_json.decode())
    library.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    library.add_special_tokens([AddedToken("[THINK]", special=True), AddedToken("[/THINK]", special=True)])
    return Tokenizer(json.dumps(json.loads(library.to_str())).encode(), 4096)


def test_formats_of_the_template_and_the_vocabulary(special: Tokenizer, tokenizer: Tokenizer) -> None:
    assert [one.opens for one in find_formats("", special)] == ["<think>", "[THINK]"]
    assert [one.opens for one in find_formats("{{ x }}", tokenizer)] == ["<think>"]
    assert [one.opens for one in find_formats("'<seed:think>'", tokenizer)] == ["<think>", "<seed:think>"]
    assert [one.wraps for one in find_formats("<think> '<response>' '</response>'", tokenizer)] == [
        None,
        ("<response>", "</response>"),
    ]
    assert [one.opens for one in find_formats("Here is my response:", tokenizer)][1:] == [
        "Here is my thought process:"
    ]
    # Without such tokens a text that looks like them is text.
    assert [one.opens for one in find_formats("[THINK]", tokenizer)] == ["<think>"]


def test_control_tokens_are_seen_though_decoding_drops_them(special: Tokenizer) -> None:
    formats = find_formats("", special)
    markers = marker_tokens(formats, special)
    assert set(markers.values()) == {"[THINK]", "[/THINK]"}
    ids = special.encode("[THINK]the fox \U0001f989[/THINK]quick")
    assert special.decode(ids) == "the fox \U0001f989quick"
    stream, splitter = MarkedStream(special, markers), ThinkingSplitter(formats)
    segments = [one for token in ids for one in splitter.push(stream.push(token))]
    segments += [*splitter.push(stream.finish()), *splitter.finish()]
    assert "".join(one.text for one in segments if one.kind == "reasoning") == "the fox \U0001f989"
    assert "".join(one.text for one in segments if one.kind == "answer") == "quick"


def test_the_prompt_tells_whether_thinking_has_begun(special: Tokenizer) -> None:
    formats = find_formats("", special)

    def opened(text: str) -> str | None:
        found = opened_by(special.encode(text), formats, special)
        return None if found is None else found.opens

    assert opened("<|im_start|>x\n<think>\n") == "<think>"
    assert opened("a long prompt " * 40 + "[THINK]") == "[THINK]"
    assert opened("<think>\n\n</think>\n\n") is None
    assert opened("what is <think>?<|im_end|>\n<|im_start|>x\n") is None
    assert opened("") is None
