"""The questions of earlier chats, for the Up key: a file that only its owner reads."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from krasis.runtime.cli.output import note

MAX_ENTRY_CHARACTERS = 16 * 1024  # a longer text is remembered in this chat only
MAX_FILE_BYTES = 1024 * 1024  # beyond it the older half is dropped
_ONLY_OWNER = 0o600


def history_path() -> Path | None:
    """``$XDG_STATE_HOME/krasis/history``, by default below ``~/.local/state``; None for a user without a
    home.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):  # noqa: PTH117 -- the standard's word: a relative path is to be ignored
        return Path(state) / "krasis" / "history"
    try:
        return Path.home() / ".local" / "state" / "krasis" / "history"
    except RuntimeError:
        return None


class ChatHistory(History):
    """prompt_toolkit's history in a file of one JSON text a line. path: None keeps nothing.

    Whatever is wrong with the file, the chat goes on; the first failure is told, and nothing is kept from
    then on.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        # Now, so that a failure is told before the first prompt and not on top of it.
        self._earlier = self._read() if path is not None else b""

    def load_history_strings(self) -> Iterable[str]:
        """The texts of the file, the newest first."""
        entries = []
        for line in self._earlier.splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # half a line of a full disk, or another's file
                continue
            if isinstance(entry, str):
                entries.append(entry)
        return reversed(entries)

    def store_string(self, string: str) -> None:
        """Keeps a text."""
        if self._path is None or len(string) > MAX_ENTRY_CHARACTERS:
            return
        line = json.dumps(string) + "\n"  # lone surrogates and newlines as escapes
        try:
            descriptor = self._open(os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self._give_up(error)

    def _read(self) -> bytes:
        try:
            with os.fdopen(self._open(os.O_RDWR | os.O_CREAT), "r+b") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(size - MAX_FILE_BYTES, 0))
                data = file.read(MAX_FILE_BYTES)
                if size > MAX_FILE_BYTES:
                    data = data[len(data) // 2 :].partition(b"\n")[2]
                    file.seek(0)
                    file.write(data)
                    file.truncate()
                return data
        except OSError as error:
            self._give_up(error)
            return b""

    def _open(self, flags: int) -> int:
        """The file's descriptor. Raises OSError also for what is no regular file of our own."""
        if self._path is None:
            raise FileNotFoundError
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags |= os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO is refused, not waited for
        descriptor = os.open(self._path, flags, _ONLY_OWNER)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(0, "not a regular file")
        if status.st_mode & 0o077 and status.st_uid == os.geteuid():
            os.fchmod(descriptor, _ONLY_OWNER)
        return descriptor

    def _give_up(self, error: OSError) -> None:
        note(f"the questions of this chat are not remembered: {self._path}: {error.strerror or error}")
        self._path = None
