"""Which rows of a hashed table tokens choose, against transformers' own embedding of n-grams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from krasis.formats.errors import FormatError
from krasis.formats.models.ngram import table_hash
from krasis.formats.models.registry import spec_from_hf
from krasis.formats.models.spec import ModelSpec, NgramTable

VOCAB, END = 320, 7


def model(longest: int, base: int, layers: list[int], vocab: int = VOCAB) -> tuple[ModelSpec, object]:
    from transformers import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        vocab_size=vocab,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=32,
        eos_token_id=[END, 5],
        ple_layer_ids=layers,
        ple_embed_dim=4 * (longest - 1),  # rows of one number
        ngram_size=longest,
        heads_per_ngram=4,
        ngram_vocab_size_base=base,
        indexer_n_heads=1,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=64,
        indexer_compress_ratio=4,
    )
    return spec_from_hf(config.to_dict(), "config.json"), config


@pytest.mark.parametrize(("longest", "base", "layers"), [(3, 50, [1, 3]), (2, 200, [2]), (4, 64, [1, 2, 3])])
def test_rows_are_those_of_transformers(longest: int, base: int, layers: list[int]) -> None:
    import torch
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

    spec, config = model(longest, base, layers)
    assert spec.ngram is not None
    random = np.random.default_rng(longest)
    tokens = random.integers(0, VOCAB, 60)
    tokens[random.integers(0, 60, 12)] = END
    tokens[[3, 4, 20]] = END
    for number, layer in enumerate(layers):
        theirs = Qwen4ExpTextNGramEmbedding(config, spec.ngram.dim, layer - 1, number)
        rows = theirs.ngram_embedding.num_embeddings
        with torch.no_grad():  # each row holds its number
            theirs.ngram_embedding.weight.copy_(torch.arange(rows, dtype=torch.float32)[:, None])
            expected = theirs(torch.tensor(tokens[None]), None)[0].numpy().astype(np.int64)
        hashes = table_hash(spec, number)
        history = np.concatenate([np.full(longest - 1, END), tokens])
        np.testing.assert_array_equal(hashes.rows(history), expected)
        assert hashes.moduli.sum() <= rows <= spec.ngram.rows
        parts = [hashes.rows(history[at : at + longest - 1 + 7]) for at in range(0, 60, 7)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)  # what came before is all that counts


def test_multipliers_of_the_released_vocabulary() -> None:
    """Products with them wrap in 64 bits at no token."""
    spec, _ = model(3, 50, [2], vocab=248320)
    multipliers = table_hash(spec, 0).multipliers
    assert all(0 < int(one) * 248319 < 1 << 63 for one in multipliers)
    assert len(set(multipliers.tolist())) == 3


def test_a_boundary_is_a_token() -> None:
    spec, _ = model(3, 50, [2])
    table = spec.ngram
    assert isinstance(table, NgramTable)
    assert table.boundary == END
    with pytest.raises(FormatError, match=r"boundary.*got 320"):
        replace(spec, ngram=replace(table, boundary=VOCAB))
    with pytest.raises(FormatError, match="no hashed table"):
        table_hash(replace(spec, layers=(spec.layers[0],), ngram=None), 0)
