"""Whether a checkpoint that ties its output head to the embedding has a head of its own all the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from krasis.convert.sources import TensorInfo, TensorTable
from krasis.formats.models.family import Family, Source

_COMPARED_BYTES = 16 << 20


def has_own_head(table: TensorTable, family: Family) -> bool:
    """Whether a Hugging Face checkpoint holds an output head whose bytes are not the embedding's.

    Reads both until they differ, so equal ones in full: such checkpoints are rare.
    """
    infos = table.infos()
    head, embedding = (_first_there(family.names[ours], infos) for ours in ("lm_head", "embedding"))
    if head is None or embedding is None:
        return False
    if (infos[head].dtype, infos[head].shape) != (infos[embedding].dtype, infos[embedding].shape):
        return True
    ours, theirs = table.view(head), table.view(embedding)
    return any(
        not np.array_equal(ours[begin : begin + _COMPARED_BYTES], theirs[begin : begin + _COMPARED_BYTES])
        for begin in range(0, ours.nbytes, _COMPARED_BYTES)
    )


def _first_there(source: Source, infos: Mapping[str, TensorInfo]) -> str | None:
    return next((name for name in source.hf if name in infos), None)
