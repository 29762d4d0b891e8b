"""Inputs as the user wrote them: paths, or names of models on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from krasis.convert.progress import Reporter
from krasis.formats.hub.name import HubName, hub_name


def parse_inputs(texts: Sequence[str]) -> list[Path | HubName]:
    """Each input as a path or a name. A path that exists is a path."""
    return [name if (name := hub_name(text)) is not None else Path(text) for text in texts]


def local_inputs(inputs: Sequence[Path | HubName], reporter: Reporter) -> list[Path]:
    """Every input on the disk: those on the hub are downloaded into its cache."""
    if not any(isinstance(one, HubName) for one in inputs):
        return [one for one in inputs if isinstance(one, Path)]
    # The hub's library takes half a second to import.
    from krasis.convert.hub.download import fetch_model

    return [fetch_model(one, reporter) if isinstance(one, HubName) else one for one in inputs]
