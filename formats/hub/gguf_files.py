"""Which GGUF of a repository is meant: by its quantisation, or by being the only one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from krasis.formats.errors import FormatError, UsageError

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Beside a model, by the names that its publishers use.
BESIDE = re.compile(r"mmproj|imatrix|(^|[-_.])lora([-_.]|$)", re.IGNORECASE)
_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|F16|F32|MXFP4(?:_MOE)?|NVFP4))(?![A-Za-z0-9_])",
    re.IGNORECASE,
)


def gguf_models(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The models among a repository's files, each with all its parts in order. What lies beside them (vision,
    importance matrices, adapters) is left out.
    """
    models: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        if not name.lower().endswith(".gguf") or BESIDE.search(name.rpartition("/")[2]):
            continue
        match = SPLIT_NAME.fullmatch(name)
        models.setdefault((match["stem"], match["count"]) if match else (name, ""), []).append(name)
    return [tuple(parts) for parts in models.values()]


def quantisation(name: str) -> str:
    """What a file's name says of its weights, such as ``Q8_0``; the name itself if nothing."""
    found = _QUANTISATION.findall(name.rpartition("/")[2]) or _QUANTISATION.findall(name)
    return found[-1].upper() if found else name


def choose_gguf(names: Iterable[str], variant: str | None, where: str) -> tuple[str, ...]:
    """The files of the GGUF that is meant. Raises UsageError that lists what there is if none or several are,
    FormatError for a repository without.
    """
    models = gguf_models(names)
    if not models:
        raise FormatError("the model has no GGUF file on the hub", where=where)
    if variant is None:
        chosen = models
    else:
        chosen = [one for one in models if variant in (one[0], one[0].rpartition("/")[2])]
        chosen = chosen or [one for one in models if quantisation(one[0]) == variant.upper()]
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(variant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        chosen = chosen or [one for one in models if pattern.search(one[0])]
    if len(chosen) == 1:
        _check_parts(chosen[0], where)
        return chosen[0]
    what = "there is no such quantisation" if not chosen else "it has several GGUF models"
    listed = [quantisation(one[0]) for one in (chosen or models)]
    if len(set(listed)) < len(listed):
        listed = [one[0] for one in (chosen or models)]
    raise UsageError(
        what,
        where=where,
        got=variant if variant and not chosen else None,
        limit=", ".join(listed),
        hint=f"name one, for example {where.partition(':')[0]}:{listed[0]}",
    )


def _check_parts(parts: Sequence[str], where: str) -> None:
    match = SPLIT_NAME.fullmatch(parts[0])
    if match is not None and len(parts) != int(match["count"]):
        got = f"{len(parts)} of {int(match['count'])} parts"
        raise FormatError("the hub lacks parts of this split GGUF", where=where, got=got)
