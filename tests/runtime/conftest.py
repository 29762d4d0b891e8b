"""A byte-level tokenizer of the kind Qwen models have, small enough to make in a test."""

from __future__ import annotations

import json

import pytest

from krasis.runtime.text.tokenizer import Tokenizer

CORPUS = [
    "def main() -> None:\n    return 'Grüße, 世界 🙂'\n",
    "import os, sys\nprint(os.path)\n",
    "the quick brown fox ",
] * 4


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """tokenizer.json of a byte-level BPE whose characters beyond ASCII are several tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer=trainer)
    library.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    return json.dumps(json.loads(library.to_str())).encode()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """The same, loaded."""
    return Tokenizer(tokenizer_json, 4096)
