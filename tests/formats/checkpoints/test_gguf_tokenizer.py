import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from krasis.formats.checkpoints.gguf_tokenizer import tokenizer_assets
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.runtime.generation_defaults import read_defaults
from krasis.runtime.settings import SamplingSettings

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER = ["<think>", "</think>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # tabs\t\tand   spaces   \n\n\n",
    "I'll say it's DON'T, we'Ve 12345 + 678,9",
    "naïve café — Ünïcödé 北京大学 日本語のテキスト עברית हिन्दी 🤖👩‍👩‍👧",
    "e\u0301 is not é until normalised; ﬁ stays",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|im_start|><|im_start|>x<|im_end|><think><|endoftext|> <think",
    "   leading, trailing   ",
    "\r\n\r\n \t mixed \u00a0 spaces\u3000",
    "\x00\x01\x7f control",
    "",
    " ",
    "a" * 300,
]


@pytest.fixture(scope="module")
def original():
    """A Hugging Face tokenizer in the manner of Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    corpus = TEXTS * 3 + [open(__file__, encoding="utf-8").read()]  # noqa: PTH123, SIM115
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER])
    return tokenizer


@pytest.fixture
def metadata(original):
    """What a GGUF made from it would say, with some padding rows at the end."""
    model = json.loads(original.to_str())["model"]
    tokens = [original.id_to_token(number) for number in range(original.get_vocab_size())]
    types = [3 if token in SPECIAL else 4 if token in USER else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "general.architecture": "qwen3moe",
        "qwen3moe.context_length": 4096,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]", "[PAD2]"],
        "tokenizer.ggml.token_type": [*types, 5, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": "{{ messages }}",
    }


def rebuild(metadata):
    return Tokenizer.from_str(tokenizer_assets(metadata, "m.gguf")["tokenizer.json"].decode())


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids_on_tricky_text(original, metadata, text):
    rebuilt = rebuild(metadata)
    expected = original.encode(text)
    result = rebuilt.encode(text)
    assert result.ids == expected.ids
    assert result.offsets == expected.offsets
    for skip in (True, False):
        assert rebuilt.decode(result.ids, skip_special_tokens=skip) == original.decode(
            expected.ids, skip_special_tokens=skip
        )


# As tiktoken has it for o200k_base and o200k_harmony.
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
CASES = [
    "helloWorld HTTPServer's CAN'T",
    "1234567 a1b22",
    "a//\n/b \u0915\u093e e\u0301\u00e9 \u01c5x",
    "  x\n\n  y ",
]


@pytest.mark.parametrize("text", [*TEXTS, *CASES])
def test_text_is_cut_as_gpt_oss_cuts_it(metadata, text):
    """The pieces of the regex package; text is not normalised."""
    regex = pytest.importorskip("regex")
    rebuilt = rebuild(metadata | {"tokenizer.ggml.pre": "gpt-4o"})
    assert rebuilt.normalizer is None
    pieces = [text[begin:end] for _, (begin, end) in rebuilt.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == regex.findall(O200K, text)


def test_the_other_files(metadata, original):
    assets = tokenizer_assets(metadata, "m.gguf")
    config = json.loads(assets["tokenizer_config.json"])
    end, pad = original.token_to_id("<|im_end|>"), original.token_to_id("<|endoftext|>")
    assert [config["eos_token"], config["pad_token"]] == ["<|im_end|>", "<|endoftext|>"]
    assert config["chat_template"] == "{{ messages }}"
    assert config["model_max_length"] == 4096
    assert config["added_tokens_decoder"][str(end)]["special"] is True
    assert config["added_tokens_decoder"][str(original.token_to_id("<think>"))]["special"] is False
    assert json.loads(assets["generation_config.json"]) == {"eos_token_id": [end]}
    more = metadata | {
        "tokenizer.ggml.eot_token_id": pad,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    generation = json.loads(tokenizer_assets(more, "x")["generation_config.json"])
    assert generation == {
        "eos_token_id": [end, pad],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
    }
    assert read_defaults(generation, "x").sampling == SamplingSettings(temperature=0.6, top_k=20)
    # What llama.cpp writes for a token that there is not.
    none = metadata | {"tokenizer.ggml.eot_token_id": 2**32 - 1}
    assert json.loads(tokenizer_assets(none, "x")["generation_config.json"]) == {"eos_token_id": [end]}


def test_transformers_reads_the_files(metadata, original, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, data in tokenizer_assets(metadata, "m.gguf").items():
        (tmp_path / name).write_bytes(data)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == original.encode(text).ids
    assert loaded.eos_token_id == original.token_to_id("<|im_end|>")
    assert loaded.chat_template == "{{ messages }}"


def test_a_leading_token_if_the_file_asks_for_it(metadata, original):
    pad = original.token_to_id("<|endoftext|>")
    asked = metadata | {"tokenizer.ggml.bos_token_id": pad, "tokenizer.ggml.add_bos_token": True}
    assert rebuild(asked).encode("hi").ids == [pad, *original.encode("hi").ids]
    assert (
        rebuild(metadata | {"tokenizer.ggml.bos_token_id": pad}).encode("hi").ids == original.encode("hi").ids
    )


@pytest.mark.parametrize("name", ["def:", ":", "::1", "$A", "$", "$0:1", "<|endoftext|>"])
def test_a_leading_token_of_any_spelling(metadata, original, name):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    number = original.token_to_id("<|endoftext|>")
    if name in tokens:
        tokens[tokens.index(name)] = "another"
    tokens[number] = name
    asked = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": number,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert rebuild(metadata | asked).encode("hi").ids == [number, *original.encode("hi").ids]


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModelError, "'llama'.*qwen2"),
        ({"tokenizer.ggml.pre": "gpt-5x"}, UnsupportedModelError, "'gpt-5x'.*checkpoint"),
        ({"tokenizer.ggml.pre": None}, UnsupportedModelError, "qwen2"),
        ({"tokenizer.ggml.tokens": []}, FormatError, "tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, FormatError, "tokens"),
        ({"tokenizer.ggml.token_type": [1]}, FormatError, "token_type.*got 1"),
        ({"tokenizer.ggml.merges": ["a zz"]}, FormatError, "merges.*'a zz'"),
        ({"tokenizer.ggml.merges": ["nospace"]}, FormatError, "merges"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, FormatError, "eos_token_id"),
        ({"tokenizer.ggml.eos_token_id": -1}, FormatError, "eos_token_id"),
        ({"tokenizer.chat_template": 5}, FormatError, "chat_template"),
    ],
)
def test_what_cannot_be_rebuilt(metadata, change, error, complaint):
    with pytest.raises(error, match=complaint):
        tokenizer_assets(metadata | change, "m.gguf")


def test_a_token_twice(metadata):
    metadata["tokenizer.ggml.tokens"][1] = metadata["tokenizer.ggml.tokens"][0]
    with pytest.raises(FormatError, match="occurs twice"):
        tokenizer_assets(metadata, "m.gguf")


@pytest.mark.parametrize("kind", [0, 1, 2, 4, 5, 6])
def test_control_tokens_by_spelling_where_the_type_is_wrong(metadata, original, kind):
    names = metadata["tokenizer.ggml.tokens"]
    wrong_types = {"<|im_end|>": kind, "<|endoftext|>": kind, "<|im_start|>": 1}
    types = [
        wrong_types.get(name, old)
        for name, old in zip(names, metadata["tokenizer.ggml.token_type"], strict=True)
    ]
    wrong = metadata | {"tokenizer.ggml.token_type": types}
    rebuilt = rebuild(wrong)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids
        assert rebuilt.decode(ids) == original.decode(ids)
    config = json.loads(tokenizer_assets(wrong, "x")["tokenizer_config.json"])
    assert all(config["added_tokens_decoder"][str(names.index(one))]["special"] for one in SPECIAL)


def test_without_any_types_control_tokens_are_still_tokens(metadata, original):
    untyped = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.token_type"}
    untyped["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:-2]
    text = "<|im_start|>user hello<|im_end|>"
    assert rebuild(untyped).encode(text).ids == original.encode(text).ids


def test_a_role_makes_no_control_token_of_a_character_or_a_word(metadata, original):
    names = metadata["tokenizer.ggml.tokens"]
    word = next(token for token in names if len(token) > 3 and token.isalpha())
    odd = metadata | {
        "tokenizer.ggml.bos_token_id": names.index(","),
        "tokenizer.ggml.padding_token_id": names.index(word),
    }
    config = json.loads(tokenizer_assets(odd, "x")["tokenizer_config.json"])
    assert "bos_token" not in config
    assert "pad_token" not in config
    text = f"a, b {word}"
    ids = original.encode(text).ids
    assert rebuild(odd).encode(text).ids == ids
    assert rebuild(odd).decode(ids) == text


def test_a_token_that_has_a_role_is_a_control_token(metadata):
    names, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    odd = metadata | {
        "tokenizer.ggml.tokens": [*names, "[STOP]"],
        "tokenizer.ggml.token_type": [*types, 1],
        "tokenizer.ggml.eos_token_id": len(names),
    }
    assert rebuild(odd).encode("a[STOP]").ids[-1] == len(names)


def test_what_merges_make_is_no_control_token(metadata):
    # Qwen2's vocabulary has </s> as an ordinary word, which transformers splits like any text.
    names = list(metadata["tokenizer.ggml.tokens"])
    merges = list(metadata["tokenizer.ggml.merges"])
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
        if left + right not in names:
            names.append(left + right)
            merges.append(f"{left} {right}")
    types = metadata["tokenizer.ggml.token_type"]
    more = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [*types, *[1] * (len(names) - len(types))],
        "tokenizer.ggml.merges": merges,
    }
    config = json.loads(tokenizer_assets(metadata | more, "x")["tokenizer_config.json"])
    assert "</s>" in names
    assert "</s>" not in [one["content"] for one in config["added_tokens_decoder"].values()]
