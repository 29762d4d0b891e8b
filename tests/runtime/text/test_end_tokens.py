"""Ends of answers: what files name in any form, what templates end turns with, spellings, stop tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from krasis.formats.errors import FormatError, UsageError
from krasis.runtime.generation import StopStrings
from krasis.runtime.text.chat import ChatTemplate
from krasis.runtime.text.end_tokens import (
    SPELLINGS,
    NamedEnds,
    added_note,
    chat_ends,
    eos_values,
    named_ends,
    read_stops,
    turn_end,
)
from krasis.runtime.text.tokenizer import Tokenizer

WHERE = "generation_config.json"
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def vocabulary(*added: str, plain: tuple[str, ...] = (), text: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with special tokens, added tokens that are none, and learnt tokens that look like some."""
    words = ["a", "b", *text]
    names = [*added, *plain]
    model = {"type": "BPE", "vocab": {word: number for number, word in enumerate(words)}, "merges": []}
    tokens = [
        {
            "id": len(words) + number,
            "content": name,
            "special": name in added,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, name in enumerate(names)
    ]
    data = {"version": "1.0", "added_tokens": tokens, "model": model}
    return Tokenizer(json.dumps(data).encode(), len(words) + len(names))


def ends(value: Any, tokenizer: Tokenizer) -> tuple[list[int], tuple[str, ...]]:
    ids, notes = named_ends([NamedEnds(WHERE, value)], tokenizer)
    return sorted(ids), notes


@pytest.mark.parametrize(
    ("value", "expected", "noted"),
    [
        (None, [], 0),
        (3, [3], 0),
        (0, [0], 0),
        ([3, 2], [2, 3], 0),
        ([3, None, 3], [3], 0),
        ([], [], 0),
        (3.0, [3], 0),
        ("3", [3], 0),
        ("<|im_end|>", [3], 0),
        (["<|endoftext|>", 3], [2, 3], 0),
        ({"content": "<|im_end|>", "special": True}, [3], 0),
        ("", [], 0),
        (-1, [], 0),
        (4, [], 1),
        ([151_645, 3], [3], 1),
        ("151645", [], 1),
        (2**63, [], 1),
        ("<|nowhere|>", [], 1),
    ],
)
def test_named_ends_in_every_form(value: Any, expected: list[int], noted: int) -> None:
    found, notes = ends(value, vocabulary("<|endoftext|>", "<|im_end|>"))
    assert (found, len(notes)) == (expected, noted)
    assert all(note.startswith(WHERE) for note in notes)


@pytest.mark.parametrize("value", [True, [True], 2.5, [[3]], {"content": 2.5}, [{"content": [1]}]])
def test_what_can_be_no_token_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="end token"):
        ends(value, vocabulary("<|endoftext|>", "<|im_end|>"))


def test_all_files_are_joined() -> None:
    tokenizer = vocabulary("<|endoftext|>", "<|im_end|>")
    files = [NamedEnds("a", [2]), NamedEnds("b", 0), NamedEnds("c", "<|im_end|>")]
    assert named_ends(files, tokenizer)[0] == {0, 2, 3}
    assert eos_values({"eos_token_id": 1, "text_config": {"eos_token_id": [2]}}) == [1, [2]]
    assert eos_values({"text_config": None}) == [None, None]


def test_an_id_left_over_in_config_json_ends_nothing() -> None:
    tokenizer = vocabulary("<|endoftext|>", "<|im_end|>")
    files = [NamedEnds("a", 3), NamedEnds("config.json", [1, 2], is_doubtful=True)]
    ids, notes = named_ends(files, tokenizer)
    assert ids == {2, 3}
    assert notes == ("config.json: the end token 1 is an ordinary token and is ignored",)
    assert named_ends([NamedEnds("config.json", [1, 2])], tokenizer)[0] == {1, 2}


def chat(template: str, tokenizer: Tokenizer, named: frozenset[int] = frozenset()) -> tuple[set[str], str]:
    """(spellings that were added, the note)."""
    found = chat_ends(named, tokenizer, ChatTemplate(template, {"eos_token": "</s>"}))
    assert found.ids == named | {tokenizer.token_id(text) for text in found.added}
    return set(found.added), added_note(found)


def test_a_turn_ends_where_the_template_ends_it() -> None:
    tokenizer = vocabulary("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    base = frozenset([tokenizer.token_id("<|endoftext|>") or 0])
    added, note = chat(CHATML, tokenizer, base)
    assert added == {"<|im_end|>"}
    assert "template ends turns with <|im_end|>" in note
    both = base | {tokenizer.token_id("<|im_end|>") or 0}
    assert chat(CHATML, tokenizer, both) == (set(), "")


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        # Llama 3, Gemma, Phi, Mistral, Command R, MiniMax, and one whose spelling no list has.
        ("'<|h|>' + m.role + m.content + '<|eot_id|>'", ("<|h|>", "<|eot_id|>"), "<|eot_id|>"),
        ("m.role + '\\n' + m.content + '<end_of_turn>\\n'", ("<end_of_turn>",), "<end_of_turn>"),
        ("'<|' + m.role + '|>\\n' + m.content + '<|end|>\\n'", ("<|user|>", "<|end|>"), "<|end|>"),
        ("m.content + (eos_token if m.role == 'assistant' else '')", ("</s>",), "</s>"),
        ("m.content + '  <|END_OF_TURN_TOKEN|>'", ("<|END_OF_TURN_TOKEN|>",), "<|END_OF_TURN_TOKEN|>"),
        ("']~b]' + m.role + '\\n' + m.content + '[e~[\\n'", ("]~b]", "[e~["), "[e~["),
        ("m.content + '<|my_own_end|>'", ("<|my_own_end|>", "<|my_own|>"), "<|my_own_end|>"),
        # GLM: a turn ends where the next one's token comes.
        ("'<|' + m.role + '|>\\n' + m.content", ("<|user|>", "<|assistant|>"), "<|user|>"),
        # Plain words end no turn, and a refusing template tells nothing.
        ("m.role + ': ' + m.content + '\\n'", ("<|x|>",), ""),
        ("raise_exception('no')", ("<|x|>",), ""),
    ],
)
def test_the_token_behind_an_assistants_turn(template: str, special: tuple[str, ...], expected: str) -> None:
    source = "{% for m in messages %}{{ " + template + " }}{% endfor %}"
    tokenizer = vocabulary(*special)
    assert turn_end(ChatTemplate(source, {"eos_token": "</s>"}), tokenizer) == expected
    assert chat(source, tokenizer)[0] == ({expected} if expected else set())


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings_count_without_the_template(text: str) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat(source, vocabulary(text))[0] == {text}
    assert chat(source, vocabulary(plain=(text,)))[0] == {text}


def test_learnt_tokens_count_only_if_no_text_is_spelled_so() -> None:
    source = "{{ messages[0].content }}"
    assert chat(source, vocabulary(text=("</s>", "<eos>", "[EOS]", "<EOT>")))[0] == set()
    assert chat(source, vocabulary(text=("<|im_end|>",)))[0] == {"<|im_end|>"}


def test_a_template_whose_turns_end_as_named_adds_nothing() -> None:
    # Cohere: a text ends before its turn does, and a call may come between.
    source = "{% for m in messages %}{{ '<|T|>' + m.content + '<|/T|><|END|>' }}{% endfor %}"
    tokenizer = vocabulary("<|T|>", "<|/T|>", "<|END|>")
    assert chat(source, tokenizer, frozenset([tokenizer.token_id("<|END|>") or 0])) == (set(), "")
    assert chat(source, tokenizer)[0] == {"<|/T|>"}
    # Kimi K3: one token closes thinking, answer and turn alike.
    source = "{% for m in messages %}{{ m.content + '<|close|>response<|close|>turn' }}{% endfor %}"
    assert chat(source, vocabulary("<|close|>")) == (set(), "")


def test_an_end_inside_an_answer_is_none() -> None:
    # gpt-oss: <|end|> parts thinking and answer; an answer ends by <|return|>, a call by <|call|>.
    turn = "'<|start|>' + m.role + '<|message|>' + m.content + '<|end|>'"
    source = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    tokenizer = vocabulary("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
    added, note = chat(source, tokenizer)
    assert added == {"<|return|>", "<|call|>"}
    assert "<|end|>" not in note


def test_a_stop_that_is_a_special_token_is_met_by_its_id() -> None:
    tokenizer = vocabulary("<|im_end|>", "[X]", plain=("<tool>",))
    found = read_stops(("<|im_end|>", "stop", "<tool>", " [X]\n", ""), tokenizer)
    assert found.ids == {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("[X]")}
    # As texts, too: a model may spell them.
    assert found.texts == ("<|im_end|>", "stop", "<tool>", " [X]\n", "")
    assert not found.signs
    assert read_stops((), tokenizer).texts == ()


def test_a_special_token_within_a_stop_is_met_by_its_id() -> None:
    tokenizer = vocabulary("<|im_start|>", "<|im_end|>")
    found = read_stops(["<|im_start|>a", "b<|im_end|>"], tokenizer)
    assert not found.ids
    start, end = (found.signs[tokenizer.token_id(text) or 0] for text in ("<|im_start|>", "<|im_end|>"))
    assert found.texts == ("<|im_start|>a", f"{start}a", "b<|im_end|>", f"b{end}")
    stops = StopStrings(found.texts, found.signs.values())
    assert stops.push(f"x{start}") == ("x", False)
    assert stops.push(f"y{end}z") == ("yz", False)
    assert stops.push("b") == ("", False)
    assert stops.push(end) == ("", True)
    # One whose text is seen anyway needs no sign.
    assert not read_stops(["<|im_start|>a"], tokenizer, set(range(9))).signs
    many = vocabulary(*(f"<|{number}|>" for number in range(40)))
    with pytest.raises(UsageError, match="too many"):
        read_stops([f"<|{number}|>a" for number in range(40)], many)
