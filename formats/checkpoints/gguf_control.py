"""Which tokens of a GGUF's vocabulary are control tokens, where their recorded type does not say so.

Converters have marked ``<|im_end|>`` and its like as ordinary tokens. llama.cpp tells such tokens by their
spelling; so do we. An ordinary token is a character or what merges make: only what neither is can have been
meant as one unit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

# What llama.cpp takes for ends of turns and of texts, and for marks of fill-in-the-middle.
_SPELLED = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>"),
        *("<end_of_turn>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>"),
        *(
            "\u2581<PRE>",
            "\u2581<SUF>",
            "\u2581<MID>",
            "<|code_prefix|>",
            "<|code_suffix|>",
            "<|code_middle|>",
        ),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
        *("<fim_repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    }
)
# Beyond llama.cpp's list, such as <|im_start|>, which a chat template writes and which must be one token.
_BARRED = re.compile(r"<[|\uff5c][^\s|\uff5c<>]+[|\uff5c]>")


def corrected_types(
    tokens: list[str], types: list[int], merged: Collection[str], named: Iterable[int]
) -> list[int]:
    """The types with control tokens marked as such. merged: what merges make. named: ids of tokens that the
    metadata gives a role (end of sequence and the like)."""
    roles = set(named)
    corrected = list(types)
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == CONTROL or len(token) < 2 or token in merged:
            continue
        is_barred = kind not in (USER_DEFINED, UNUSED) and _BARRED.fullmatch(token) is not None
        if token in _SPELLED or number in roles or is_barred:
            corrected[number] = CONTROL
    return corrected
