"""A service on the tiny model's text and a scripted core, and clients of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from krasis.runtime.text.assets import TextAssets
from tests.support.scripted_core import ScriptedCore

TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe"
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


def tiny_files(template: str | None = None) -> dict[str, bytes]:
    """The tiny model's text files, with another template if wanted."""
    files = {name: (TINY / name).read_bytes() for name in NAMES}
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


T = TypeVar("T")


class Reply:
    """An answer of the application."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; ``[DONE]`` as text."""
        found = []
        for block in self.text.split("\n\n"):
            lines = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
            found += [line if line == "[DONE]" else json.loads(line) for line in lines]
        return found


class Served:
    """An application that is asked without a network."""

    def __init__(self, core: ScriptedCore, **settings: Any) -> None:
        from krasis.runtime.server.app import make_app
        from krasis.runtime.server.service import ServeSettings, Service

        self.core = core
        self.loop = asyncio.new_event_loop()
        self._files = tiny_files()
        chosen = ServeSettings(**{"aliases": ("tiny", "other"), **settings})
        self.service = Service(core, core.assets, chosen, lambda: self._files["tokenizer.json"])
        self.app = make_app(self.service)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request, to its end."""
        return self.run(self.ask_async(method, path, body, headers))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What work gives, in the server's loop."""
        return self.loop.run_until_complete(work)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, body, {key.replace("_", "-"): value for key, value in headers.items()})

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, {key.replace("_", "-"): value for key, value in headers.items()})

    async def ask_async(
        self,
        method: str,
        path: str,
        body: Any,
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
    ) -> Reply:
        """leave_after: the client leaves after so many pieces of the body."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", 8080),
            "client": ("127.0.0.1", 1),
            "headers": [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()],
        }
        left = asyncio.Event()
        given: list[bytes] = [data]
        pieces: list[bytes] = []
        start: dict[str, Any] = {}

        async def receive() -> dict[str, Any]:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message.get("body"):
                pieces.append(message["body"])
                if leave_after is not None and len(pieces) >= leave_after:
                    left.set()

        if leave_after == 0:
            asyncio.get_running_loop().call_later(0.05, left.set)
        await self.app(scope, receive, send)
        found = {key.decode(): value.decode() for key, value in start.get("headers", [])}
        return Reply(start.get("status", 0), found, b"".join(pieces))


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def tiny_assets() -> TextAssets:
    """The tiny model's own text."""
    return TextAssets.of_files(tiny_files(), "tiny", 4096)


@pytest.fixture
def serve(tiny_assets: TextAssets) -> Iterator[Serve]:
    """``serve(script=..., settings of ScriptedCore, template=..., serving={...})``."""
    made: list[Served] = []

    def make(template: str | None = None, serving: dict[str, Any] | None = None, **options: Any) -> Served:
        assets = tiny_assets if template is None else TextAssets.of_files(tiny_files(template), "tiny", 4096)
        made.append(Served(ScriptedCore(assets, **options), **(serving or {})))
        return made[-1]

    yield make
    for one in made:
        one.core.close()
        one.service.close()
        one.run(one.loop.shutdown_asyncgens())
        one.loop.close()


def says(text: str) -> Callable[[Any], str]:
    """A script of one answer."""
    return lambda _: text


@pytest.fixture
def qwen3_template() -> str:
    """A template with thinking and calls, in Qwen3's form."""
    return QWEN3


QWEN3 = (Path(__file__).parent / "qwen3_form.jinja").read_text("utf-8")
