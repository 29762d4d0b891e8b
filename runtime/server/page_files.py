"""The server's page for people, its own or another build's: files, and headers that keep all else out."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from krasis.formats.errors import UsageError

OWN_PAGE = Path(__file__).parent / "page"
INDEX = "index.html"
# Browsers are told not to guess, so a type must not depend on what a machine's /etc/mime.types says.
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".map": "application/json",
    ".webmanifest": "application/manifest+json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".ico": "image/vnd.microsoft.icon",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".ttf": "font/ttf",
    ".txt": "text/plain",
}
# Nothing but this server's own files; no text becomes markup or script, whoever wrote it.
_OWN_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
# Other builds have scripts and styles in their HTML. Still nothing from outside.
_OTHER_POLICY = (
    "default-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class PageFiles:
    """The files under one folder, asked for by paths of URLs. Files and folders whose names begin with a dot,
    links that lead out of the folder, and what is no regular file are not there.

    Raises UsageError for a folder without an ``index.html``.
    """

    def __init__(self, folder: Path = OWN_PAGE) -> None:
        if not (folder / INDEX).is_file():
            raise UsageError(
                "this folder has no page in it",
                where=str(folder),
                got=f"no {INDEX}",
                hint="--ui wants the folder that a web page was built into",
            )
        self._root = os.path.realpath(folder)
        self._policy = _OWN_POLICY if folder == OWN_PAGE else _OTHER_POLICY

    def find(self, path: str) -> tuple[str, os.stat_result] | None:
        """The file behind a URL's path, ``/`` and folders for the ``index.html`` in them."""
        parts = [part for part in path.split("/") if part]
        if "\\" in path or any(part.startswith(".") for part in parts):
            return None
        # A folder without the slash is none: its page's links would lead one level too high.
        names = [*parts, INDEX] if path.endswith("/") else parts
        return self._regular(os.path.join(self._root, *names))  # noqa: PTH118  no Path: it would clean it

    def _regular(self, path: str) -> tuple[str, os.stat_result] | None:
        try:
            whole = os.path.realpath(path)
            if os.path.commonpath([whole, self._root]) != self._root:
                return None
            status = os.stat(whole)  # noqa: PTH116
        except (OSError, ValueError):  # too long, a loop of links, a zero byte
            return None
        return (whole, status) if stat.S_ISREG(status.st_mode) and os.access(whole, os.R_OK) else None

    def is_asked(self, scope: Scope) -> bool:
        """Whether a request is one for a file that is here; for ``/`` it must be a browser's."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        return wants_page(scope) if scope["path"] == "/" else self.find(scope["path"]) is not None

    async def response(self, scope: Scope) -> Response:
        """The answer to a GET or HEAD. Raises HTTPException if there is no such file."""
        found = None
        if scope["method"] in ("GET", "HEAD"):
            found = await run_in_threadpool(self.find, scope["path"])
        if found is None:
            raise HTTPException(404)
        path, status = found
        headers = _HEADERS | {"Cache-Control": _caching(path), "Content-Security-Policy": self._policy}
        if scope["path"] == "/":
            headers["Vary"] = "Accept"
        kind = _TYPES.get(PurePosixPath(path).suffix.lower(), "application/octet-stream")
        answer = FileResponse(path, headers=headers, media_type=kind, stat_result=status)
        if StaticFiles.is_not_modified(_RULES, answer.headers, Headers(scope=scope)):
            return NotModifiedResponse(answer.headers)
        return answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        await (await self.response(scope))(scope, receive, send)


_RULES = StaticFiles(check_dir=False)  # for its comparison of tags and dates


def wants_page(scope: Scope) -> bool:
    """Whether who asks for ``/`` is a browser that will show it. Agents and health checks look there too,
    with HEAD or for anything; they get a line of text."""
    if scope["method"] != "GET":
        return False
    for kind in Headers(scope=scope).get("accept", "").split(","):
        name, *rules = (part.strip().lower() for part in kind.split(";"))
        if name in ("text/html", "application/xhtml+xml"):
            return not any(rule.replace(" ", "") in ("q=0", "q=0.0") for rule in rules)
    return False


def _caching(path: str) -> str:
    """Asked again each time, and answered with 304: a new version is seen at once. Builds put what never
    changes, for its name has its hash, into folders of this name."""
    return "public, max-age=31536000, immutable" if "/immutable/" in path else "no-cache"
