"""Inputs as the user wrote them: paths, or names of models on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from krasis.convert.partial import partial_path
from krasis.convert.progress import Reporter
from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.hub.name import HubName, hub_name

if TYPE_CHECKING:
    from krasis.convert.hub.streamed import StreamedSources


def parse_inputs(texts: Sequence[str]) -> list[Path | HubName]:
    """Each input as a path or a name. A path that exists is a path."""
    return [name if (name := hub_name(text)) is not None else Path(text) for text in texts]


def local_texts(text: str) -> Path:
    """Where the text files are that ``text`` names: a path, or a model's on the hub, fetched."""
    name = hub_name(text)
    if name is None:
        return Path(text)
    from krasis.convert.hub.download import fetch_texts

    return fetch_texts(name)


def local_inputs(inputs: Sequence[Path | HubName], reporter: Reporter) -> list[Path]:
    """Every input on the disk: those on the hub are downloaded into its cache."""
    if not any(isinstance(one, HubName) for one in inputs):
        return [one for one in inputs if isinstance(one, Path)]
    # The hub's library takes half a second to import.
    from krasis.convert.hub.download import fetch_model

    return [fetch_model(one, reporter) if isinstance(one, HubName) else one for one in inputs]


def is_begun(out: Path) -> bool:
    """Whether a conversion to that output left anything to go on with."""
    from krasis.convert.hub.store import sources_path

    return partial_path(out).exists() or sources_path(out).exists()


@contextmanager
def opened_inputs(
    inputs: Sequence[Path | HubName],
    out: Path,
    reporter: Reporter,
    *,
    restart: bool,
    plan_only: bool,
    drop: bool,
) -> Iterator[tuple[list[Path], StreamedSources | None]]:
    """Every input as a path. With drop, those on the hub are downloaded while they are converted, by what is
    given beside the paths; their parts stay for a run that goes on if the block ends by an error, and go with
    the end of the conversion. For a plan only their headers are fetched in any case.
    """
    on_the_hub = any(isinstance(one, HubName) for one in inputs)
    if not drop and not (plan_only and on_the_hub):
        yield local_inputs(inputs, reporter), None
        return
    from krasis.convert.hub.opening import open_streamed

    paths, streamed = open_streamed(inputs, out, reporter, restart=restart)
    if streamed is None:
        yield paths, None
        return
    is_kept = False
    try:
        yield paths, streamed
        is_kept = plan_only and partial_path(out).exists()
    except BaseException as error:
        # What the same command would not do either has nothing to go on with.
        is_kept = partial_path(out).exists() or not isinstance(error, KrasisError | SystemExit)
        is_kept = is_kept or isinstance(error, ResourceError)
        raise
    finally:
        if is_kept:
            streamed.close()
        else:
            streamed.finish()
