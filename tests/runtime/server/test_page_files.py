"""The page for browsers: who gets it, with which headers, and that nothing outside its folder is served."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from krasis.formats.errors import UsageError
from krasis.runtime.server.command import main
from krasis.runtime.server.page_files import OWN_PAGE, PageFiles
from krasis.runtime.server.running import Door

from .conftest import Serve

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
OWN: dict[str, Any] = {"ui": OWN_PAGE}
NAMES = sorted(path.name for path in OWN_PAGE.iterdir())


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A page that another program built, with what must not be served in it and beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "build"
    for name, text in {
        "index.html": "<h1>other</h1>",
        "app.mjs": "1",
        "_app/immutable/a.js": "2",
        "fonts/a.woff2": "3",
        "deep/index.html": "deep",
        "a b & ü.txt": "4",
        "props": "a file",
        "v1/models": "a file",
        ".env": "secret",
        ".git/config": "secret",
        "odd.xyz": "5",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "inside.txt").symlink_to(folder / "odd.xyz")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"accept": "*/*"},
        {"accept": "application/json"},
        {"accept": "text/plain, */*;q=0.1"},
        {"accept": "text/html;q=0, */*"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_agents_at_the_root_get_a_line_of_text(serve: Serve, method: str, headers: dict[str, str]) -> None:
    found = serve(serving=OWN).ask(method, "/", None, headers)
    assert (found.status, found.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    if method == "GET":
        assert found.text == "krasis-serve is running. The API is under /v1.\n"


@pytest.mark.parametrize(
    "headers", [BROWSER, {"accept": "Text/HTML"}, {"accept": "a/b;q=1, text/html ; q=0.5"}]
)
def test_browsers_at_the_root_get_the_page(serve: Serve, headers: dict[str, str]) -> None:
    found = serve(serving=OWN).ask("GET", "/", None, headers)
    assert (found.status, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert found.headers["vary"] == "Accept"
    assert found.body == (OWN_PAGE / "index.html").read_bytes()
    assert serve(serving=OWN).ask("HEAD", "/", None, headers).headers["content-type"].startswith("text/plain")
    assert serve().ask("GET", "/", None, headers).headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_page_and_their_headers(serve: Serve, name: str) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    found = serve(serving={**OWN, "api_keys": ("k",)}).get(f"/{name}")
    assert found.status == 200
    assert found.body == (OWN_PAGE / name).read_bytes()
    assert found.headers["content-type"].split(";")[0] == kinds[Path(name).suffix]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["referrer-policy"] == "no-referrer"
    assert found.headers["cache-control"] == "no-cache"
    policy = dict(
        part.strip().partition(" ")[::2] for part in found.headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert {policy.pop(f"{kind}-src") for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert set(policy) == {"base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert set(policy.values()) == {"'none'"}
    assert serve().get(f"/{name}").status == 404


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_that_its_policy_forbids() -> None:
    """No scripts or styles in the HTML, and addresses of this folder's files only."""
    reader = _Tags()
    reader.feed((OWN_PAGE / "index.html").read_text("utf-8"))
    for tag, attributes in reader.tags:
        assert tag != "style"
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            assert attributes.get(name) in (None, *NAMES), (tag, attributes)
    assert all("src" in attributes for tag, attributes in reader.tags if tag == "script")
    for path in OWN_PAGE.glob("*.js"):
        text = path.read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        )
        assert {f"./{name}" for name in NAMES} >= set(re.findall(r'from "([^"]+)"', text)), path.name
    assert "url(" not in (OWN_PAGE / "page.css").read_text("utf-8")


def test_what_has_not_changed_is_not_sent_again(serve: Serve) -> None:
    served = serve(serving=OWN)
    tag = served.get("/app.js").headers["etag"]
    again = served.get("/app.js", if_none_match=f'"x", W/{tag}')
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert served.get("/app.js", if_none_match='"other"').status == 200


def test_another_build(serve: Serve, build: Path) -> None:
    served = serve(serving={"ui": build})
    assert served.ask("GET", "/", None, BROWSER).body == b"<h1>other</h1>"
    for path, kind in {
        "/app.mjs": "text/javascript; charset=utf-8",
        "/fonts/a.woff2": "font/woff2",
        "/deep/": "text/html; charset=utf-8",
        "/a b & ü.txt": "text/plain; charset=utf-8",
        "/odd.xyz": "application/octet-stream",
        "/inside.txt": "application/octet-stream",
    }.items():
        found = served.get(path)
        assert (found.status, found.headers["content-type"]) == (200, kind), path
        assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
    assert "immutable" in served.get("/_app/immutable/a.js").headers["cache-control"]
    assert served.get("/app.js").status == 404  # our own page's
    assert served.ask("HEAD", "/app.mjs").status == 200
    assert served.post("/app.mjs", {}).status == 404


def test_a_build_hides_nothing_of_the_api(serve: Serve, build: Path) -> None:
    served = serve(serving={"ui": build, "api_keys": ("k",)})
    for path in ("/props", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/metrics", "/nothing"):
        assert served.get(path).status == 401, path
    assert served.get("/app.mjs").status == 200
    assert "default_generation_settings" in served.get("/props", x_api_key="k").json
    assert served.get("/v1/chat/completions", x_api_key="k").status == 405


OUTSIDE = [
    *("/../secret.txt", "/..%2fsecret.txt", "/deep/../../secret.txt", "/./../secret.txt", "//../secret.txt"),
    *("/..\\secret.txt", "/%2e%2e/secret.txt", "/out.txt", "/up/secret.txt", "/up/", "/loop", "/pipe"),
    *("/pipe/", "/.env", "/.git/config", "/deep/.git", "/deep", "/app.mjs/", "/app.mjs/x", "/etc/passwd"),
    "//etc/passwd",
]
ODD = ["/\x00", "/a\x00.txt", "/index.html\x00.js", "/\ufffd", "/" + "a" * 5000, "/" + "a/" * 3000]


@pytest.mark.parametrize("path", [*OUTSIDE, *ODD])
def test_nothing_outside_the_folder(serve: Serve, build: Path, path: str) -> None:
    found = serve(serving={"ui": build}).get(path)
    assert found.status == 404
    assert b"secret" not in found.body
    assert found.json["error"]["message"]


def test_what_may_not_be_read_is_not_there(
    serve: Serve, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: not path.endswith("app.mjs"))  # root may read all
    assert serve(serving={"ui": build}).get("/app.mjs").status == 404


def test_a_folder_without_a_page_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no page in it.*no index\.html"):
        PageFiles(tmp_path)
    bundle = str(tmp_path)
    for options in (
        ["--ui", str(tmp_path / "none")],
        ["--ui", str(tmp_path)],
        ["--no-ui", "--ui", str(OWN_PAGE)],
    ):
        found = CliRunner().invoke(main, [bundle, *options, "--port", "0"], prog_name="krasis-serve")
        assert found.exit_code == 2, found.output
        assert "--ui" in found.output


@pytest.mark.parametrize(
    ("origin", "host", "keys", "status"),
    [
        ("http://192.168.1.5:8080", "192.168.1.5:8080", (), 200),
        ("http://[fd00::5]:8080", "[fd00::5]:8080", (), 200),
        ("http://HERE:8080", "here:8080", (), 200),
        ("http://here.local:8080", "here.local:8080", (), 200),
        ("http://192.168.1.6:8080", "192.168.1.5:8080", (), 403),
        ("http://192.168.1.5:9090", "192.168.1.5:8080", (), 403),
        ("http://evil.example:8080", "evil.example:8080", (), 403),  # its owner lets it point here
        ("https://llm.example", "llm.example", ("k",), 200),
        ("https://evil.example", "llm.example", ("k",), 403),
        ("null", "", ("k",), 403),
    ],
)
def test_the_page_may_ask_its_own_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, origin: str, host: str, keys: tuple[str, ...], status: int
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Here.lan")
    served = serve(serving={**OWN, "api_keys": keys})
    headers = {"origin": origin, "host": host, "x-api-key": "k"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert served.ask("POST", "/v1/chat/completions", body, headers).status == status


def test_people_may_look_at_the_page_while_the_model_is_loading(serve: Serve) -> None:
    served = serve()
    served.app = Door(PageFiles())
    for path in ("/app.js", "/page.css"):
        assert served.get(path).body == (OWN_PAGE / path[1:]).read_bytes()
    assert served.ask("GET", "/", None, BROWSER).headers["content-type"] == "text/html; charset=utf-8"
    for asked in ("GET /", "HEAD /", "GET /props", "GET /none.js", "POST /app.js"):
        method, path = asked.split()
        found = served.ask(method, path)
        assert (found.status, found.headers["retry-after"]) == (503, "5"), path
