"""Any JSON object as generation_config.json, any value as end token: read, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError
from krasis.runtime.generation_defaults import describe, read_defaults
from krasis.runtime.text.end_tokens import NamedEnds, named_ends
from krasis.runtime.text.tokenizer import Tokenizer

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | st.sampled_from(["", "0.7", "-1", "nan", "true", "<|im_end|>", "\x1b[2J", "9" * 5000, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("content"), inner, max_size=1),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("penalty_last_n", "typical_p", "mirostat", "sequence", "stop_strings", "temp", "num_beams", "x"),
    ]
)
VOCABULARY = Tokenizer(
    b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
    b'"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"BPE","dropout":null,'
    b'"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,'
    b'"byte_fallback":false,"vocab":{"a":0,"<|im_end|>":1},"merges":[]}}',
    4,
)


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, "") or (None, the sentence)."""
    try:
        return read(), ""
    except FormatError as error:
        return None, str(error)


def is_one_line(text: str) -> bool:
    return all(char.isprintable() for char in text) and len(text) < 2000


@given(st.dictionaries(NAMES, VALUES, max_size=6))
@settings(max_examples=400, deadline=None)
def test_sampling_is_read_or_refused(config: dict[str, Any]) -> None:
    found, refusal = read_or_refused(lambda: read_defaults(config, "here"))
    if found is None:
        assert refusal.startswith("here: ")
        assert is_one_line(refusal)
        return
    assert 0.0 <= found.sampling.temperature <= 100.0
    assert all(is_one_line(note) for note in found.notes)
    assert is_one_line(describe(found.sampling))


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_end_tokens_are_read_or_refused(value: Any) -> None:
    found, refusal = read_or_refused(lambda: named_ends([NamedEnds("here", value)], VOCABULARY))
    if found is None:
        assert is_one_line(refusal)
        return
    ids, notes = found
    assert ids <= {0, 1, 2, 3}
    assert all(is_one_line(note) for note in notes)
