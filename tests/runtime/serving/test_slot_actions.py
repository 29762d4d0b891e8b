"""Slots that an operator saves, fills and empties, and slots that a request must have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime.serving.api import Delta, Finished, Request
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import OpenedCore, open_core
from krasis.runtime.settings import EngineSettings
from tests.support.patience import PATIENCE_S

PROMPT = list(range(40, 140))
OTHER = list(range(200, 290))


@contextmanager
def opened(bundle: Path, folder: Path | None, num_slots: int = 2) -> Iterator[OpenedCore]:
    settings = CoreSettings(num_slots=num_slots, cache_bytes=0)
    with open_core(bundle, EngineSettings(device="cpu", threads=1), settings, slot_dir=folder) as core:
        core.core.start()
        yield core


def answer(core: OpenedCore, prompt: list[int], slot: int | None = None) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt were found."""
    request = Request(id="x", prompt=prompt, max_tokens=12, ignore_ends=True, is_plain=True, slot=slot)
    tokens: list[int] = []
    for event in core.core.submit(request).events(PATIENCE_S):
        if isinstance(event, Delta):
            tokens += event.tokens
        elif isinstance(event, Finished):
            return tokens, event.usage.num_cached
    raise AssertionError("no end")


def test_a_saved_slot_is_gone_on_from_in_another_process(tiny_bundle: Path, tmp_path: Path) -> None:
    with opened(tiny_bundle, tmp_path) as core:
        expected, _ = answer(core, PROMPT, slot=1)
        saved = core.slots.save(1, "a.kv").result(PATIENCE_S)
        assert saved.num_bytes == (tmp_path / "a.kv").stat().st_size
        assert len(PROMPT) <= saved.num_tokens == core.core.status().slots[1].num_tokens
    with opened(tiny_bundle, tmp_path) as core:
        assert core.slots.restore(0, "a.kv").result(PATIENCE_S).num_tokens == saved.num_tokens
        assert answer(core, PROMPT, slot=0) == (expected, len(PROMPT) - 1)


def test_an_emptied_slot_holds_nothing(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, None) as core:
        answer(core, PROMPT, slot=0)
        assert core.slots.erase(0).result(PATIENCE_S) >= len(PROMPT)
        assert core.slots.erase(1).result(PATIENCE_S) == 0
        assert answer(core, PROMPT, slot=0)[1] == 0


def test_what_the_slot_held_before_is_kept_elsewhere(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = CoreSettings(num_slots=1, cache_bytes=2**24)
    engine = EngineSettings(device="cpu", threads=1)
    with open_core(tiny_bundle, engine, settings, slot_dir=tmp_path) as core:
        core.core.start()
        answer(core, PROMPT)
        core.slots.save(0, "a.kv").result(PATIENCE_S)
        answer(core, OTHER)
        core.slots.restore(0, "a.kv").result(PATIENCE_S)
        assert answer(core, OTHER)[1] == len(OTHER) - 1


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.kv", "/etc/passwd", ".hidden", "a/b", "a\x00b", "no.kv"]
)
def test_files_are_in_the_folder_and_nowhere_else(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    with opened(tiny_bundle, folder) as core:
        with pytest.raises(UsageError):
            core.slots.restore(0, name).result(PATIENCE_S)
        if name != "no.kv":
            with pytest.raises(UsageError):
                core.slots.save(0, name).result(PATIENCE_S)
    assert list(folder.iterdir()) == []


def test_damaged_files_and_strange_ones_change_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with opened(tiny_bundle, tmp_path) as core:
        expected, _ = answer(core, PROMPT, slot=0)
        core.slots.save(0, "a.kv").result(PATIENCE_S)
        data = bytearray((tmp_path / "a.kv").read_bytes())
        data[-5] ^= 1
        (tmp_path / "bad.kv").write_bytes(data)
        (tmp_path / "strange.kv").write_bytes(b"nothing")
        for name in ("bad.kv", "strange.kv"):
            with pytest.raises(KrasisError):
                core.slots.restore(0, name).result(PATIENCE_S)
        with pytest.raises(UsageError):
            core.slots.save(0, "strange.kv").result(PATIENCE_S)
        with pytest.raises(UsageError, match="empty"):
            core.slots.save(1, "b.kv").result(PATIENCE_S)
        with pytest.raises(UsageError, match="no such slot"):
            core.slots.erase(2).result(PATIENCE_S)
        assert answer(core, PROMPT, slot=0) == (expected, len(PROMPT) - 1)


def test_requests_of_one_slot_wait_for_each_other_and_for_nobody_else(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, None) as core:
        plain = {"max_tokens": 5, "ignore_ends": True, "is_plain": True}
        tickets = [core.core.submit(Request(id=f"{n}", prompt=PROMPT[n:], slot=0, **plain)) for n in range(3)]
        free = core.core.submit(Request(id="free", prompt=OTHER, **plain))
        for ticket in [free, *tickets]:
            assert isinstance(list(ticket.events(PATIENCE_S))[-1], Finished)
        assert core.core.status().counters.num_finished == {"length": 4}
        with pytest.raises(UsageError, match="no such slot"):
            core.core.submit(Request(id="x", prompt=PROMPT, slot=2))


def test_a_slot_in_use_is_let_be(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, None) as core:
        ticket = core.core.submit(Request(id="x", prompt=PROMPT, slot=0, ignore_ends=True, is_plain=True))
        next(iter(ticket.events(PATIENCE_S)))
        with pytest.raises(UsageError, match="works in this slot"):
            core.slots.erase(0).result(PATIENCE_S)
        ticket.cancel()


def test_over_http(tiny_bundle: Path, tmp_path: Path) -> None:
    from krasis.runtime.server.app import make_app
    from krasis.runtime.server.service import ServeSettings, Service

    with opened(tiny_bundle, tmp_path) as core:
        service = Service(core.core, core.text, ServeSettings(slots=False), lambda: b"", core.slots)
        app = make_app(service)

        async def post(path: str, query: str, body: Any) -> tuple[int, Any]:
            given = [json.dumps(body).encode()]
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                if given:
                    return {"type": "http.request", "body": given.pop(), "more_body": False}
                await asyncio.sleep(30)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "root_path": ""}
            await app({**scope, "query_string": query.encode(), "http_version": "1.1"}, receive, send)
            return sent[0]["status"], json.loads(sent[1]["body"])

        async def everything() -> None:
            answered = await post("/completion", "", {"prompt": PROMPT, "n_predict": 4, "id_slot": 1})
            assert (answered[0], answered[1]["id_slot"]) == (200, 1)
            status, saved = await post("/slots/1", "action=save", {"filename": "a.kv"})
            assert (status, saved["filename"], saved["id_slot"]) == (200, "a.kv", 1)
            status, restored = await post("/slots/0", "action=restore", {"filename": "a.kv"})
            assert (status, restored["n_restored"]) == (200, saved["n_saved"])
            status, erased = await post("/slots/1", "action=erase", {})
            assert (status, erased["n_erased"]) == (200, saved["n_saved"])
            for path, query, body in (
                ("/slots/7", "action=erase", {}),
                ("/slots/x", "action=erase", {}),
                ("/slots/1", "action=melt", {}),
                ("/slots/1", "", {}),
                ("/slots/1", "action=save", {}),
                ("/slots/1", "action=save", {"filename": "../a"}),
                ("/slots/1", "action=restore", {"filename": 5}),
            ):
                assert (await post(path, query, body))[0] == 400
            assert (await post("/completion", "", {"prompt": [5], "id_slot": 2}))[0] == 400

        asyncio.run(everything())
        service.close()
