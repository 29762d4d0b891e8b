"""Vocabularies that were resized in the weights and not in the words beside them."""

from __future__ import annotations

from collections.abc import Mapping

from krasis.convert.names import BY_OURS
from krasis.formats.errors import FormatError

_BY_VOCABULARY = frozenset(
    name for ours in ("embedding", "lm_head") for name in (BY_OURS[ours].hf, BY_OURS[ours].gguf)
)


def check_vocabulary(tensor: str, found: tuple[int, ...], shape: tuple[int, ...], where: str) -> None:
    """Raises FormatError, with the way out, if a tensor of the wrong shape is an embedding or output head
    with another number of tokens only. shape: [vocab, hidden], what was expected.
    """
    if tensor not in _BY_VOCABULARY or len(found) != 2 or found[1] != shape[1]:
        return
    is_hf = tensor in (BY_OURS["embedding"].hf, BY_OURS["lm_head"].hf)
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
