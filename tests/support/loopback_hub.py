"""A small hub on loopback: models are folders, files have ETags and SHA-256 sums, ranges are served."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 1 << 16  # what is larger is kept apart, as the hub does with LFS
CHUNK_BYTES = 1 << 16


@dataclass
class Model:
    """A folder under a name. gated: needs a token that may; private: is not there without one."""

    folder: Path
    gated: bool = False
    private: bool = False
    revisions: dict[str, Path] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a branch or commit."""
        for name, folder in {"main": self.folder, **self.revisions}.items():
            commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()  # noqa: S324 -- as git does
            if revision in (name, commit):
                return commit, folder
        return None


class LoopbackHub:
    """Serves ``models`` (by ``org/name``) at ``endpoint`` until closed. sent: file bytes that were read.

    requests: (method, path, range, token) of each. cut_every: connections break after so many bytes.
    with_sizes: whether listings have sizes.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.sent = 0
        self.cut_every: int | None = None
        self.failures = 0  # so many requests for large files fail with 503 first
        self.with_sizes = True
        self.token = "hf_loopback"  # noqa: S105
        self._digests: dict[tuple[Path, int], str] = {}
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        # Large files come from another origin, as the hub's do: tokens must not go there.
        self._servers = [_Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{one.server_address[1]}" for one in self._servers)
        self._threads = [threading.Thread(target=one.serve_forever, args=(0.05,)) for one in self._servers]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def close(self) -> None:
        """Stops serving."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def digest(self, path: Path) -> str:
        """A file's SHA-256, or for a small one its blob's id."""
        key = path, path.stat().st_mtime_ns
        if key not in self._digests:
            if path.stat().st_size < LARGE_BYTES:
                data = path.read_bytes()
                self._digests[key] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324
            else:
                with path.open("rb") as file:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[key]

    def count(self, num_bytes: int) -> None:
        """File bytes on their way."""
        with self._lock:
            self.sent += num_bytes


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Readers that were killed are no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        hub.requests.append((self.command, path, self.headers.get("Range"), token))
        if path.startswith("/cdn/"):
            return self._bytes(Path(path.removeprefix("/cdn")), {})
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" if is_api else "").strip("/").split("/")
        model = hub.models.get("/".join(parts[:2]))
        may = token == f"Bearer {hub.token}"
        if model is None or (model.private and not may):
            return self._error(401, "RepoNotFound", "Repository not found")
        if model.gated and not may and not is_api:
            return self._error(401, "GatedRepo", "Access to this model is restricted")
        revision = (parts[3] if len(parts) > 3 else "main") if is_api else parts[3]
        found = model.at(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", "Revision not found")
        commit, folder = found
        return self._list(commit, folder) if is_api else self._resolve(commit, folder, "/".join(parts[4:]))

    def _list(self, commit: str, folder: Path) -> None:
        siblings = []
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            entry: dict[str, Any] = {"rfilename": str(path.relative_to(folder))}
            if self.server_hub.with_sizes:
                size, digest = path.stat().st_size, self.server_hub.digest(path)
                entry |= {"size": size, "blobId": digest[:40]}
                if size >= LARGE_BYTES:
                    entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        data = json.dumps({"id": "x/y", "modelId": "x/y", "sha": commit, "siblings": siblings}).encode()
        self._send(200, {"Content-Type": "application/json"}, data)

    def _resolve(self, commit: str, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self.server_hub.digest(path)}"'}
        if path.stat().st_size < LARGE_BYTES:
            return self._bytes(path, headers)
        headers["X-Linked-Etag"] = headers.pop("ETag")
        headers["X-Linked-Size"] = str(path.stat().st_size)
        headers["Location"] = f"{self.server_hub.storage}/cdn{path.resolve()}"
        return self._send(302, headers, b"")

    def _bytes(self, path: Path, headers: dict[str, str]) -> None:
        hub = self.server_hub
        if self.command == "GET" and "X-Repo-Commit" not in headers and hub.failures > 0:
            hub.failures -= 1
            return self._error(503, "", "try again")
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        if wanted := self._range():
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(size, int(last) + 1 if last else size), 206
            if begin >= size:
                return self._error(416, "", "range")
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._head(status, {**headers, "Accept-Ranges": "bytes"}, end - begin)
        if self.command == "HEAD":
            return None
        return self._copy(path, begin, end)

    def _range(self) -> str | None:
        return self.headers.get("Range")

    def _copy(self, path: Path, begin: int, end: int) -> None:
        hub = self.server_hub
        if hub.cut_every is not None and end - begin > hub.cut_every:
            end, self.close_connection = begin + hub.cut_every, True
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(CHUNK_BYTES, end - begin))
                try:
                    self.wfile.write(data)
                except OSError:  # the reader was killed
                    self.close_connection = True
                    return
                hub.count(len(data))
                begin += len(data)

    def _error(self, status: int, code: str, text: str) -> None:
        headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self._send(status, headers, json.dumps({"error": text}).encode())

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self._head(status, headers, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def use_hub(monkeypatch: Any, hub: LoopbackHub, folder: Path) -> Path:
    """The hub's library here and in child processes works with the hub, and with a cache in folder."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    places = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "HF_XET_CACHE": "xet"}
    for name, leaf in {**places, "AGENT_HARNESSES_PATH": ".agent_harnesses.json"}.items():
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, str(folder / leaf))
    return folder
