"""Vocabularies that were resized in the weights and not in the words beside them."""

from __future__ import annotations

from collections.abc import Mapping

from krasis.formats.errors import FormatError


def check_vocabulary(
    ours: str, found: tuple[int, ...], shape: tuple[int, ...], where: str, *, is_hf: bool
) -> None:
    """Raises FormatError, with the way out, if a tensor of the wrong shape is an embedding or output head
    with another number of tokens only. ours: its name in a bundle. shape: [vocab, hidden], what was expected.
    """
    if ours not in ("embedding", "lm_head") or len(found) != 2 or found[1] != shape[1]:
        return
    expected = "config.json's vocab_size" if is_hf else "the embedding"
    way_out = (
        f"set vocab_size to {found[0]} if the embedding, the output head and the tokenizer all have that size"
    )
    raise FormatError(
        f"the vocabulary was resized: {expected} says another number of tokens",
        where=where,
        got=f"{found[0]} rows",
        limit=f"{shape[0]}",
        hint=way_out
        if is_hf
        else "get another GGUF of the model: embedding and output head do not fit each other",
    )


def check_gguf_tokens(metadata: Mapping[str, object], num_rows: int, where: str) -> None:
    """Raises FormatError if a GGUF names more tokens than its embedding has rows: their ids would lead
    nowhere.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > num_rows:
        raise FormatError(
            "the vocabulary was resized: there are more tokens than rows of the embedding",
            where=f"{where}: tokenizer.ggml.tokens",
            got=f"{len(tokens)} tokens",
            limit=f"{num_rows} rows",
            hint="get another GGUF of the model",
        )
