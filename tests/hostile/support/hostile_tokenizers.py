"""tokenizer.json files that make the library panic, raise, abort, loop or grow: by kind, and random."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

_PATTERNS = {
    "plus_plus": "(a+)+$",
    "plus_plus_words": r"(\w+\s?)+$",
    "alternatives": "(a|a)*b",
    "alternatives_dot": "(.|a)*z",
    "star_star": "(.*)*x",
    "letters_equals": "([a-zA-Z]+)*=",
    "lookahead": "(?=(a+))a*b(?=(.*)+z)",
    "backreference": r"(.*)\1\1\1z",
    "lookbehind": "(?<=a|bc|d{1,100})x",
    "huge_repeat": "(a{1,1000}){1,1000}b",
    "huge_count": "a{100000}",
    "deep_groups": "(" * 3000 + "a" + ")" * 3000,
    "nothing": "",
    "empty_loop": "(a*)*",
    "possessive": "(?>a+)+b",
    "classes": r"[\p{L}\p{N}]*[\p{L}]*[\p{L}]*[\p{L}]*[\p{L}]*[\p{L}]*[\p{L}]*$z",
    "unbalanced": "(a",
    "end": "$",
    "boundary": r"\b",
}


def base() -> Json:
    """A sound byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "a"), ("t", "h"), ("th", "e"), ("i", "n")]
    vocabulary = {token: i for i, token in enumerate([*letters, *(one + other for one, other in merges)])}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    return dict(json.loads(library.to_str()))


def _replace(old: Json | str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old} if isinstance(old, str) else old, "content": new}


def _sequence(kind: str, items: list[Json]) -> Json:
    return {"type": "Sequence", kind: items}


def _truncation(**changes: Any) -> Json:
    usual = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return {"truncation": usual | changes}


def _padding(strategy: Any, multiple: int | None = None, direction: str = "Left", filler: str = "x") -> Json:
    return {
        "padding": {
            "strategy": strategy,
            "direction": direction,
            "pad_to_multiple_of": multiple,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": filler,
        }
    }


def _added(number: int, content: str, **flags: bool) -> Json:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **usual, **flags}


def _changes(sound: Json) -> dict[str, Json]:
    """What is exchanged in a sound file, by name of the case."""
    model = sound["model"]
    double = [_replace(letter, letter * 2) for letter in "aeinrst"]
    cases: dict[str, Json] = {
        "stride above the length": _truncation(stride=9),
        "stride at the length": _truncation(stride=4),
        "only second": _truncation(strategy="OnlySecond"),
        "only first": _truncation(strategy="OnlyFirst", max_length=0),
        "length 0": _truncation(max_length=0),
        "length of 2^64-1": _truncation(max_length=2**64 - 1),
        "left and stride": _truncation(direction="Left", stride=3),
        "padding of 10^12": _padding({"Fixed": 10**12}),
        "padding of 10^9": _padding({"Fixed": 10**9}),
        "padding of 10^7": _padding({"Fixed": 10**7}),
        "padding of 2^64-1": _padding({"Fixed": 2**64 - 1}),
        "padding to multiples of 10^12": _padding("BatchLongest", 10**12),
        "padding to multiples of 0": _padding("BatchLongest", 0),
        "padding by a long token": _padding({"Fixed": 10**5}, filler="x" * 10**5),
        "prepend a megabyte": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        "replace by a megabyte": {"normalizer": _replace("e", "e" * 10**6)},
        "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "precompiled of zeros": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 4000}},
        "normalizer doubles 40 times": {"normalizer": _sequence("normalizers", [_replace("a", "aa")] * 40)},
        "normalizer doubles all": {"normalizer": _sequence("normalizers", double * 40)},
        "normalizer decomposes": {"normalizer": _sequence("normalizers", [{"type": "NFKD"}] * 5000)},
        "normalizers nested": {"normalizer": _nested("normalizers", 100)},
        "normalizers nested deeply": {"normalizer": _nested("normalizers", 5000)},
        "pre-tokenizers nested deeply": {"pre_tokenizer": _nested("pretokenizers", 5000)},
        "pre-tokenizers in thousands": {
            "pre_tokenizer": _sequence("pretokenizers", [sound["pre_tokenizer"]] * 300)
        },
        "fixed length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "fixed length of 2^63": {"pre_tokenizer": {"type": "FixedLength", "length": 2**63}},
        "metaspace of many": {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "__", "prepend_scheme": "always"}
        },
        "no pre-tokenizer": {"pre_tokenizer": None},
        "no decoder": {"decoder": None},
        "unknown decoder": {"decoder": {"type": "Exec", "command": "id"}},
        "decoder doubles 40 times": {
            "decoder": _sequence("decoders", [_replace(c, c + c) for c in "aeinrst"] * 40)
        },
        "decoder of a megabyte": {"decoder": _replace("a", "a" * 10**6)},
        "decoder that empties": {"decoder": _replace("", "x")},
        "decoder that strips": {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}},
        "decoders nested deeply": {"decoder": _nested("decoders", 5000)},
        "decoder ctc": {
            "decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}
        },
        "decoder of bytes": {"decoder": {"type": "ByteFallback"}},
        "decoder of words": {"decoder": {"type": "WordPiece", "prefix": "", "cleanup": True}},
        "decoder bpe": {"decoder": {"type": "BPEDecoder", "suffix": ""}},
        "post-processor bert": {
            "post_processor": {"type": "BertProcessing", "sep": ["s", 2**32 - 1], "cls": ["c", 0]}
        },
        "post-processor with a hundred thousand": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}] * 100_000,
                "pair": [],
                "special_tokens": {
                    "<|im_end|>": {"id": "<|im_end|>", "ids": [0] * 1000, "tokens": ["a"] * 1000}
                },
            }
        },
        "template without its token": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[X]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {},
            }
        },
        "template without the text": {
            "post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
        },
        "added at 2^32-1": {"added_tokens": [_added(2**32 - 1, "<|far|>")]},
        "added twice": {"added_tokens": [_added(0, "a"), _added(0, "b"), _added(1, "a")]},
        "added empty": {"added_tokens": [_added(260, "")]},
        "added in thousands": {"added_tokens": [_added(300 + i, f"<{i}>") for i in range(20_000)]},
        "added and normalised": {
            "added_tokens": [_added(300 + i, "a" * i, normalized=True) for i in range(1, 1500)],
            "normalizer": _replace("a", "aa"),
        },
        "added a megabyte": {"added_tokens": [_added(300, "a" * 10**6)]},
        "added of one letter": {
            "added_tokens": [_added(300, "a", lstrip=True, rstrip=True, single_word=True)]
        },
        "added space": {"added_tokens": [_added(300, " ", lstrip=True, rstrip=True)]},
        "added control": {"added_tokens": [_added(300, "\x1b]0;owned\x07")]},
        "no model": {"model": None},
        "model of another type": {"model": {"type": "Pickle"}},
        "empty vocabulary": {"model": {**model, "vocab": {}, "merges": []}},
        "ids at 2^32-1": {"model": {**model, "vocab": {**model["vocab"], "zz": 2**32 - 1}}},
        "ids at 2^32": {"model": {**model, "vocab": {**model["vocab"], "zz": 2**32}}},
        "negative ids": {"model": {**model, "vocab": {**model["vocab"], "zz": -1}}},
        "one id for all": {"model": {**model, "vocab": dict.fromkeys(model["vocab"], 0)}},
        "empty token": {"model": {**model, "vocab": {**model["vocab"], "": 500}}},
        "merge of nothing": {"model": {**model, "merges": [["", "a"]]}},
        "merge of strangers": {"model": {**model, "merges": [["q" * 9, "b"]]}},
        "merge of control": {"model": {**model, "merges": [["\x1b]0;owned\x07", "b"]]}},
        "merge of one": {"model": {**model, "merges": [["a"]]}},
        "merges as text": {"model": {**model, "merges": ["a", "a b c"]}},
        "merges repeated": {"model": {**model, "merges": [["a", "a"]] * 100_000}},
        "merges in a chain": {"model": _chain(model, 3000)},
        "dropout": {"model": {**model, "dropout": 1.0}},
        "dropout of 9": {"model": {**model, "dropout": 9.0}},
        "subword prefix": {"model": {**model, "continuing_subword_prefix": "##"}},
        "word suffix": {"model": {**model, "end_of_word_suffix": "\U0001f642" * 1000}},
        "byte fallback": {
            "model": {**model, "byte_fallback": True, "unk_token": "nothing", "fuse_unk": True}
        },
        "unknown token": {"model": {**model, "unk_token": "nothing"}},
        "word level without its unknown": {
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
        },
        "word pieces without an unknown": {
            "model": {
                "type": "WordPiece",
                "vocab": {"a": 0},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "",
                "max_input_chars_per_word": 2**62,
            }
        },
        "word pieces of 0": {
            "model": {
                "type": "WordPiece",
                "vocab": {"a": 0, "[UNK]": 1},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 0,
            }
        },
        "unigram empty": {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
        "unigram outside": {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}},
        "unigram without unknown": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
        "unigram of 1e308": {
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e308], ["aa", -1e308]]}
        },
        "unigram of nothing": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["", 0.0]]}},
        "unigram and bytes": {
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]], "byte_fallback": True}
        },
    }
    for name, pattern in _PATTERNS.items():
        regex = {"Regex": pattern}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        cases[f"split by {name}"] = {"pre_tokenizer": split}
        cases[f"split by {name}, merged"] = {
            "pre_tokenizer": {**split, "behavior": "MergedWithNext", "invert": True}
        }
        cases[f"normalise by {name}"] = {"normalizer": _replace(regex, "a" * 50)}
        cases[f"decode by {name}"] = {"decoder": _replace(regex, "a" * 50)}
    return cases


def _nested(kind: str, depth: int) -> str:
    """A mark for sequences in sequences, too deep for Python's own encoder."""
    return f"@{kind}@{depth}@"


def _encoded(value: Json) -> bytes:
    def nested(match: re.Match[str]) -> str:
        begin = f'{{"type": "Sequence", "{match[1]}": ['
        return begin * int(match[2]) + "]}" * int(match[2])

    return re.sub(r'"@(\w+)@(\d+)@"', nested, json.dumps(value)).encode()


def _chain(model: Json, length: int) -> Json:
    """Tokens a, aa, aaa, ... each of the one before: 4.5 MB of text for 3000."""
    vocabulary = dict(model["vocab"])
    for size in range(2, length):
        vocabulary.setdefault("a" * size, len(vocabulary))
    return {**model, "vocab": vocabulary, "merges": [["a" * (size - 1), "a"] for size in range(2, length)]}


def named_tokenizers() -> dict[str, bytes]:
    """The known kinds."""
    sound = base()
    text = json.dumps(sound).encode()
    cases = {name: _encoded({**sound, **change}) for name, change in _changes(sound).items()}
    return cases | {
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "an object": b"{}",
        "cut": text[:-40],
        "bytes": text.replace(b"model", b"mod\xff\xfe"),
        "byte order mark": b"\xef\xbb\xbf" + text,
        "twice": text + text,
        "brackets": b"[" * 500_000,
        "objects": b'{"model":' * 100_000,
        "spaces": b" " * 4_000_000 + text,
        "a number of a million digits": text.replace(b'"version": "1.0"', b'"version": ' + b"9" * 10**6),
        "not a number": text.replace(b'"dropout": null', b'"dropout": NaN'),
        "a key twice": text.replace(b'"truncation": null', b'"truncation": null, "truncation": null'),
        "version 9": text.replace(b'"1.0"', b'"9.0"'),
    }


def random_tokenizers(
    count: int, seed: int, mutate_json: Callable[[Any, random.Random], Any]
) -> dict[str, bytes]:
    """Sound and hostile files with random damage."""
    rng = random.Random(seed)
    sound = base()
    pool = [sound, *({**sound, **change} for change in _changes(sound).values() if len(str(change)) < 30_000)]
    return {f"random {number}": _encoded(mutate_json(rng.choice(pool), rng)) for number in range(count)}
