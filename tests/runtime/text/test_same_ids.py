"""Token ids are those of transformers on the same folder, whatever the files and whatever the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError, UsageError
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARD = [
    "\ufeffa byte order mark is a character, here\ufeff and there",
    "a\x00b\x00",
    "\u0301\u0308 marks on nothing, and e\u0301",
    " " * 3000 + "x" + "\t" * 500 + "\n" * 500,
    "<|im_start|>user\n<|im_end|><|endoftext|><|im_star",
    "👩‍👩‍👧‍👦🏳️‍🌈\u200d\u202e",
    "\r\n\r \u00a0\u3000\u2028",
    "<think>def</think> <tool>",
    "",
]
PAD = {
    "strategy": {"Fixed": 32},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 4093,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def added(*contents: str, **flags: bool) -> list[dict[str, Any]]:
    """Entries of tokenizer.json for some of the tiny model's special tokens."""
    ids = dict(zip(SPECIAL, range(4093, 4096), strict=True))
    return [{"id": ids[one], "content": one, "special": True, **FLAGS, **flags} for one in contents]


def decoder(*contents: str, **flags: bool) -> dict[str, dict[str, Any]]:
    """The same in the form of tokenizer_config.json."""
    rows = added(*contents, **flags)
    return {str(row["id"]): {key: row[key] for key in row if key != "id"} for row in rows}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "truncation": {"tokenizer": {"truncation": CUT}},
    "padding": {"tokenizer": {"padding": PAD}},
    "both, and another class": {"tokenizer": {"truncation": CUT, "padding": PAD}, "config": FAST},
    "the last token only beside": {"tokenizer": {"added_tokens": added(*SPECIAL[:2])}},
    "the first token only beside": {"tokenizer": {"added_tokens": added(*SPECIAL[1:])}},
    "all tokens only beside": {"tokenizer": {"added_tokens": []}},
    "only named": {
        "tokenizer": {"added_tokens": added(*SPECIAL[:2])},
        "config": {"added_tokens_decoder": ..., "additional_special_tokens": ..., **FAST},
    },
    "only among the additional": {
        "tokenizer": {"added_tokens": added(*SPECIAL[:2])},
        "config": {"added_tokens_decoder": ..., "eos_token": "<|endoftext|>", **FAST},
    },
    "by the newer name of these": {
        "tokenizer": {"added_tokens": added(*SPECIAL[:2])},
        "config": {
            "added_tokens_decoder": ...,
            "additional_special_tokens": ...,
            "extra_special_tokens": ["<|im_end|>"],
            "eos_token": "<|endoftext|>",
            **FAST,
        },
    },
    "in the older files": {
        "tokenizer": {"added_tokens": added(*SPECIAL[:1])},
        "config": {"added_tokens_decoder": ..., "additional_special_tokens": ..., "eos_token": ..., **FAST},
        "added_tokens": {"<|im_start|>": 4094, "<|im_end|>": 4095},
        "special_tokens_map": {"eos_token": {"content": "<|im_end|>", **FLAGS}},
    },
    "a word of the vocabulary": {"config": {"additional_special_tokens": ["def"]}},
    "a word of the vocabulary, another class": {"config": {"extra_special_tokens": ["def"], **FAST}},
    "not special in the file, but beside it": {
        "tokenizer": {"added_tokens": added(*SPECIAL, special=False)},
    },
    "takes the spaces beside it": {
        "config": {"added_tokens_decoder": decoder(*SPECIAL, lstrip=True, rstrip=True), **FAST}
    },
    "takes the spaces beside it, Qwen's class": {
        "config": {"added_tokens_decoder": decoder(*SPECIAL, lstrip=True, rstrip=True)}
    },
    "special tokens are split": {"config": {"split_special_tokens": True}},
    "add_bos_token says nothing": {"config": {"add_bos_token": True, "bos_token": "<|endoftext|>"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_transformers(
    variant: str, folder: Any, ours: Callable[[Path], TextAssets], theirs: Callable[[Path], Any]
) -> None:
    path = folder(**VARIANTS[variant])
    tokenizer, reference = ours(path).tokenizer, theirs(path)
    assert not tokenizer.notes
    for text in [*HARD, "a long text of more than eight tokens, as <|im_end|> it is <|im_start|> said"]:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text, special=True) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids)


@pytest.fixture(scope="module")
def pair(theirs: Callable[[Path], Any]) -> tuple[Tokenizer, Any]:
    files = {file.name: file.read_bytes() for file in TINY.iterdir() if file.suffix == ".json"}
    return TextAssets.of_files(files, "tiny", 4096).tokenizer, theirs(TINY)


PIECES = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*HARD[:3], *HARD[4:], *SPECIAL]),
    st.integers(1, 300).map(lambda count: " " * count),
)


@given(st.lists(PIECES, max_size=6).map("".join))
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_of_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, reference = pair
    assert tokenizer.encode(text, special=True) == reference(text)["input_ids"]


def test_a_token_beyond_the_rows_is_left_out_and_told(folder: Any, ours: Any) -> None:
    extra = {"4096": {"content": "[PAD]", "special": True, **FLAGS}}
    path = folder(config={"added_tokens_decoder": decoder(*SPECIAL) | extra, "pad_token": "[PAD]"})
    tokenizer = ours(path).tokenizer
    assert len(tokenizer.notes) == 1
    assert "'[PAD]' is left out" in tokenizer.notes[0]
    assert max(tokenizer.encode("[PAD]")) < 4093
    rows = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    (path / "tokenizer.json").write_text(
        json.dumps(
            json.loads((path / "tokenizer.json").read_text())
            | {"added_tokens": [*rows, {**rows[0], "id": 4096, "content": "[PAD]"}]}
        )
    )
    with pytest.raises(FormatError, match="more tokens than the model"):
        _ = ours(path).tokenizer


def test_ids_of_the_files_hold_where_the_library_would_renumber(folder: Any, ours: Any) -> None:
    # Token 4094 is nowhere: the library counts on, so <|im_end|> would be 4094.
    path = folder(
        tokenizer={"added_tokens": added(SPECIAL[0], SPECIAL[2])},
        config={
            "added_tokens_decoder": decoder(SPECIAL[0], SPECIAL[2]),
            "additional_special_tokens": [],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer = ours(path).tokenizer
    assert tokenizer.encode("<|endoftext|>a<|im_end|>") == [4093, 64, 4095]
    assert not tokenizer.notes


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"added_tokens_decoder": []}, "must be an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "not the id of a token"),
        ({"added_tokens_decoder": {"9": "a"}}, "object with its content"),
        ({"added_tokens_decoder": {"9": {"content": "a", "special": 1}}}, "must be true or false"),
        ({"additional_special_tokens": 7}, "must be a list"),
    ],
)
def test_what_is_no_token_is_refused(folder: Any, ours: Any, config: dict[str, Any], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        _ = ours(folder(config=config)).tokenizer


@pytest.mark.parametrize("text", ["a\udcff", "\ud83d", "\udc80\udc81"])
def test_half_characters_are_refused_in_a_sentence(pair: tuple[Tokenizer, Any], text: str) -> None:
    with pytest.raises(UsageError, match="not UTF-8 text"):
        pair[0].encode(text)


@pytest.mark.parametrize("text", [b"abc", None, 7, ["a"]])
def test_what_is_no_text_is_refused(pair: tuple[Tokenizer, Any], text: Any) -> None:
    with pytest.raises(UsageError, match="must be text"):
        pair[0].encode(text)


def test_a_byte_order_mark_at_the_head_of_a_file_is_no_part_of_it(folder: Any, ours: Any) -> None:
    path = folder()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    (path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    text = ours(path)
    assert text.template.render([{"role": "user", "content": "hi"}]) == "hi"
    assert text.tokenizer.encode("hi") == [71, 72]
    assert 4095 in text.named_ends
