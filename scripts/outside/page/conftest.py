"""A server of the page with a scripted core, and a browser that visits it."""

# ruff: noqa: S101  these are tests
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from krasis.runtime.server.app import make_app
from krasis.runtime.server.page_files import OWN_PAGE, PageFiles
from krasis.runtime.server.running import Door, listen
from krasis.runtime.server.service import ServeSettings, Service
from krasis.runtime.text.assets import TextAssets
from tests.support.scripted_core import ScriptedCore

TESTS = Path(__file__).parents[3] / "tests"
TINY = TESTS / "assets" / "tiny-qwen3-moe"
TEMPLATE = TESTS / "runtime" / "server" / "qwen3_form.jinja"


@dataclass
class Served:
    """A server of the page with a core that answers as it is told."""

    url: str
    core: ScriptedCore
    ready: Callable[[], None]  # ends the loading
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options: Any = {"executable_path": os.environ.get("KRASIS_BROWSER", "/usr/bin/chromium")}
        with playwright.chromium.launch(args=["--no-sandbox"], **options) as opened:
            yield opened


@pytest.fixture
def serve() -> Iterator[Serve]:
    ends: list[Callable[[], None]] = []

    def start(
        text: str, template: str = TEMPLATE.read_text("utf-8"), loading: bool = False, **options: Any
    ) -> Served:
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        files = {name: (TINY / name).read_bytes() for name in names}
        files["chat_template.jinja"] = template.encode()
        settings = {name: options.pop(name) for name in ("api_keys", "ping_interval_s") if name in options}
        core = ScriptedCore(TextAssets.of_files(files, "tiny", 4096), lambda _: text, **options)
        service = Service(
            core, core.assets, ServeSettings(ui=OWN_PAGE, **settings), lambda: files["tokenizer.json"]
        )
        listener = listen("127.0.0.1", 0)
        door = Door(PageFiles())
        app = make_app(service)
        if not loading:
            door.app = app
        server = uvicorn.Server(uvicorn.Config(door, lifespan="off", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        def end() -> None:
            service.close()
            core.close()
            server.should_exit = True
            thread.join(20)
            listener.close()

        ends.append(end)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        return Served(url, core, ready=lambda: setattr(door, "app", app))

    yield start
    for end in ends:
        end()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """``visit(served, settings of the browser)``: the page; what it must never do ends the test."""
    opened: list[tuple[Page, Served]] = []

    def go(served: Served, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1180, "height": 820}, **options})
        page, faults = context.new_page(), served.faults
        opened.append((page, served))
        page.on("console", lambda one: faults.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda one: served.requests.append(one))  # noqa: PLW0108  it marks functions
        page.goto(served.url)
        return page

    yield go
    for page, served in opened:
        page.context.close()
        expected = ("status of 401", "status of 503")
        assert [one for one in served.faults if not any(words in one for words in expected)] == []


def say(page: Page, words: str) -> None:
    page.get_by_label("Message", exact=True).fill(words)
    page.keyboard.press("Enter")


def picture(page: Page, name: str) -> None:
    folder = os.environ.get("KRASIS_SHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def is_over(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=20_000)
