"""Reads parts of files on the hub over HTTP, and goes on where a connection broke."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.hub.refusals import TRANSPORT_ERRORS, hub_errors

_TIMEOUT_S = 60.0
_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 30.0
_MOST_TRIES = 8  # one after another without a byte between them
_BUSY = (429, 500, 502, 503, 504)


class RemoteFile:
    """A file of a repository at one commit, so that its bytes never change. url: where it can be read."""

    def __init__(self, url: str, num_bytes: int, where: str, first_wait_s: float = _FIRST_WAIT_S) -> None:
        self._url, self._num_bytes, self._where = url, num_bytes, where
        self._first_wait_s = first_wait_s

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from begin to end (exclusive) in order. Tries again when the network fails.

        Raises as ``hub_errors`` when it fails for good, FormatError for an answer of other bytes.
        """
        tries = 0
        while begin < end:
            try:
                for data in self._answer(begin, end):
                    tries, begin = 0, begin + len(data)
                    yield data
                if begin < end:
                    raise OSError("the connection ended early")
            except TRANSPORT_ERRORS as error:
                tries += 1
                if tries >= _MOST_TRIES or not _may_pass(error):
                    with hub_errors(self._where):
                        raise
                time.sleep(min(_MOST_WAIT_S, self._first_wait_s * 2 ** (tries - 1)))

    def _answer(self, begin: int, end: int) -> Iterator[bytes]:
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        request: Any = get_session().stream(
            "GET", self._url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
        )
        with request as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            self._check(response, begin, end)
            left = end - begin
            for data in response.iter_raw():
                if len(data) > left:
                    raise FormatError("the hub sends more than was asked for", where=self._where)
                left -= len(data)
                yield data

    def _check(self, response: Any, begin: int, end: int) -> None:
        got = response.headers.get("Content-Range", "")
        wanted = f"bytes {begin}-{end - 1}/{self._num_bytes}"
        whole = response.status_code == 200 and begin == 0 and end == self._num_bytes
        if not whole and (response.status_code != 206 or got != wanted):
            raise ResourceError(
                "the hub does not give parts of this file",
                where=self._where,
                got=f"status {response.status_code}, {got or 'no range'}",
                limit=wanted,
                hint="convert without --drop-sources",
            )


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code in _BUSY
    return True
