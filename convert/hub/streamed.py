"""Sources on the hub of which only parts are on the disk while they are converted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from krasis.convert.hub.fetcher import Fetcher
from krasis.convert.hub.spans import Spans
from krasis.convert.hub.store import SourceStore
from krasis.convert.plan import ConversionPlan, Unit
from krasis.convert.sources import WeightSource
from krasis.formats.hub.repository import HubFile

# Beyond what the largest unit needs.
_SLACK_BYTES = 64 << 20
# Alignment between tensors is fetched too, rather than asked around.
_MAX_GAP_BYTES = 64 << 10
_UNITS_AHEAD = 4


class StreamedSources:
    """What a conversion asks for before it reads, and tells when it has read.

    files: what the hub says of each weight file, by its place. heads: where their headers end.
    """

    def __init__(
        self,
        store: SourceStore,
        fetcher: Fetcher,
        files: Mapping[Path, HubFile],
        heads: Mapping[Path, int],
    ) -> None:
        self._store, self._fetcher, self._files, self._heads = store, fetcher, files, heads
        self._needs: list[dict[Path, Spans]] = []
        self._index: dict[str, int] = {}
        self._done: set[int] = set()

    @property
    def fetched_bytes(self) -> int:
        """What this run downloaded."""
        return self._fetcher.fetched_bytes

    @property
    def allowed_bytes(self) -> int:
        """The most that sources take on the disk, but for what a check reads again."""
        return self._fetcher.allowed_bytes

    def held_bytes(self) -> int:
        """What they take now."""
        return self._store.allocated_bytes()

    def need(self, path: Path, begin: int, end: int) -> None:
        """Returns when these bytes are there; for a checkpoint to call. Raises KrasisError."""
        self._fetcher.need(path, begin, end)

    def sizes_only(self) -> AbstractContextManager[None]:
        """Inside, no bytes of tensors are fetched."""
        return self._fetcher.sizes_only()

    def version(self, path: Path) -> str | None:
        """What tells a file from others of its name, None for one of the user's own."""
        file = self._files.get(Path(os.path.abspath(path)))  # noqa: PTH100 -- links are not followed
        return None if file is None else file.digest

    def recall(self, memo: str) -> Any:
        """A result that an earlier run remembered, None if there is none."""
        return self._store.recall(memo)

    def remember(self, memo: str, value: Any) -> None:
        """Keeps a JSON value, so that a run that goes on need not fetch what it came from again."""
        self._store.remember(memo, value)

    # ---- the plan's units -------------------------------------------------------------------------------

    def schedule(self, plan: ConversionPlan) -> None:
        """Works out what each unit needs, and how much may be fetched ahead of it."""
        self._needs = [self._needs_of(plan, unit) for unit in plan.units]
        self._index = {unit.name: number for number, unit in enumerate(plan.units)}
        self._fetcher.allowed_bytes = _allowed(self._needs)

    def _needs_of(self, plan: ConversionPlan, unit: Unit) -> dict[Path, Spans]:
        is_dense = unit.kind in ("dense", "table")
        source = plan.dense_source if is_dense else plan.expert_source(unit.kind)
        names = source.tensors_of(unit.layer, experts=not is_dense, tables=unit.kind == "table")
        places = _places(source)
        found: dict[Path, list[tuple[int, int]]] = {}
        for name in names:
            path = places[name]
            if path in self._store.files:
                found.setdefault(path, []).append(source.place(name))
        return {path: Spans(spans, _MAX_GAP_BYTES) for path, spans in found.items()}

    def begin(self, unit: str) -> None:
        """The unit is next: what it needs comes, and what the units after it need."""
        first = self._index[unit]
        coming = self._needs[first : first + _UNITS_AHEAD]
        self._fetcher.expect([(path, spans) for needs in coming for path, spans in needs.items()])

    def end(self, unit: str) -> None:
        """The unit is finished and on the disk: what no other needs goes."""
        self._done.add(self._index[unit])
        self._drop()

    def go_on(self, finished: Iterable[str]) -> None:
        """These units were finished by an earlier run."""
        self._done |= {self._index[unit] for unit in finished}
        self._drop()

    def _drop(self) -> None:
        kept: dict[Path, Spans] = {path: Spans([(0, end)]) for path, end in self._heads.items()}
        for number, needs in enumerate(self._needs):
            if number not in self._done:
                for path, spans in needs.items():
                    kept[path] = kept.get(path, Spans()).union(spans)
        self._fetcher.drop_but(kept)

    @contextmanager
    def used(self) -> Iterator[None]:
        """If the block ends by an error or an interruption, no thread goes on waiting for the network."""
        try:
            yield
        except BaseException:
            self._fetcher.abandon()
            raise

    # ---- the end ----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The bundle is complete: everything goes."""
        self._fetcher.close()
        self._store.remove()

    def close(self) -> None:
        """Lets go; what is there stays for a run that goes on."""
        self._fetcher.close()
        self._store.close()


def _places(source: WeightSource) -> dict[str, Path]:
    return {
        name: Path(os.path.abspath(file.path))  # noqa: PTH100 -- links are not followed
        for file in source.files
        for name in file.tensors
    }


def _allowed(needs: Sequence[Mapping[Path, Spans]]) -> int:
    """Twice what the largest unit needs, but not more than a quarter of all, and what that unit needs at
    least.
    """
    last: dict[tuple[Path, int, int], int] = {}
    for number, need in enumerate(needs):
        for path, spans in need.items():
            last |= {(path, begin, end): number for begin, end in spans}
    total = sum(end - begin for _, begin, end in last)
    largest, held = 0, dict[tuple[Path, int, int], int]()
    for number, need in enumerate(needs):
        held = {key: until for key, until in held.items() if until >= number}
        held |= {(path, *span): last[path, *span] for path, spans in need.items() for span in spans}
        largest = max(largest, sum(end - begin for _, begin, end in held))
    return max(largest + _SLACK_BYTES, min(2 * largest, total // 4))
