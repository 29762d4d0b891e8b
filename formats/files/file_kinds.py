"""What a file is that was given for another: pointers, error pages, archives, pickles, formats of old.

A download that failed or a clone without git-lfs leaves files under the right names; a sentence about their
header's length helps nobody. The first bytes say what they are.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.names import shown
from krasis.formats.units import format_bytes

HEAD_BYTES = 1024
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r\f"))  # characters that no text has
_LEAST_ZEROS, _LEAST_TEXT = 256, 8
AGAIN = "get the file again, for example with 'hf download'"
LFS_HINT = "run 'git lfs install' and 'git lfs pull' in the clone, or get the files with 'hf download'"
PICKLE_HINT = (
    "get the checkpoint in safetensors, or load it in transformers where you trust it and save it with "
    "save_pretrained(..., safe_serialization=True)"
)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UNPACK = "unpack it and give what is inside"
_GGML = "a GGML file of the time before GGUF"
_GGML_HINT = "get a current GGUF of the model"

# first bytes -> (what it is, what to do)
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself", LFS_HINT),
    (b"version https://hawser.github.com/spec/", "a git-lfs pointer, not the file itself", LFS_HINT),
    (b"# xet version", "a Xet pointer, not the file itself", AGAIN),
    (b"GGUF", "a GGUF file", "give it by the name of a .gguf file"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (ZSTD_MAGIC, "a Zstandard archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an LZ4 archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"lmgg", _GGML, _GGML_HINT),
    (b"fmgg", _GGML, _GGML_HINT),
    (b"tjgg", _GGML, _GGML_HINT),
    (b"algg", "a GGML adapter (LoRA) of the time before GGUF", "give the model itself"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "give the checkpoint in safetensors, or a GGUF"),
    (b"\x93NUMPY", "a NumPy array", "give the checkpoint in safetensors, or a GGUF"),
    (b"\x7fELF", "a program", AGAIN),
    (b"%PDF", "a PDF document", AGAIN),
    (b"SQLite format 3", "a database", AGAIN),
)
_PAGE = re.compile(rb"<!doctype html|<html|<head|<body|<!-- ", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,100})", re.IGNORECASE)
_POINTER_SIZE = re.compile(rb"\nsize (\d{1,18})\n")
# How servers answer instead of a file.
_ANSWERS = re.compile(
    rb"entry not found|not found|invalid (username|credentials)|access to (model|this)|repository not found|"
    rb"unauthorized|forbidden|error code|internal server error|bad gateway|too many requests",
    re.IGNORECASE,
)
_JSON_ANSWER = re.compile(rb'\{\s*"(error|errors|message|detail)"\s*:', re.IGNORECASE)
_UNFINISHED = (
    ".incomplete",
    ".part",
    ".partial",
    ".crdownload",
    ".aria2",
    ".download",
    ".tmp",
    ".!qb",
    ".st",
)


@dataclass(frozen=True, slots=True)
class FileKind:
    """what: with its article, ``a gzip archive``; hint: what to do about it."""

    what: str
    hint: str


def kind_of_bytes(head: bytes) -> FileKind | None:
    """What a file that begins so is; None if that says nothing."""
    for magic, what, hint in _MAGICS:
        if head.startswith(magic):
            size = _POINTER_SIZE.search(head) if b"pointer" in what.encode() else None
            words = f"{what} (of {format_bytes(int(size.group(1)))})" if size else what
            return FileKind(words, hint)
    if head[257:262] == b"ustar":
        return FileKind("a tar archive", _UNPACK)
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head or b"/version" in head:
            return FileKind("a PyTorch pickle, which Krasis never opens: it can run any code", PICKLE_HINT)
        return FileKind("a zip archive", _UNPACK)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return FileKind("a Python pickle, which Krasis never opens: it can run any code", PICKLE_HINT)
    if len(head) >= _LEAST_ZEROS and not head.strip(b"\0"):
        return FileKind("nothing but zeros: space for a download that was not finished", AGAIN)
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> FileKind | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PAGE.match(text):
        title = _TITLE.search(text)
        named = f" ({shown(title.group(1).decode('utf-8', 'replace').strip())})" if title else ""
        return FileKind(f"an HTML page{named}, not the file: the download failed", AGAIN)
    if text.startswith(b"<?xml"):
        return FileKind("an XML text, not the file: the download failed", AGAIN)
    if len(text) < _LEAST_TEXT or not _is_text(head):
        return None
    is_json = text[:1] in (b"{", b"[")
    if _JSON_ANSWER.match(text) if is_json else _ANSWERS.search(text[:300]):
        return FileKind(f"a server's answer, not the file: {shown(_line(text))}", AGAIN)
    if is_json:
        return FileKind("a JSON text", "give the weights' file or the folder it lies in")
    return FileKind(f"a text that begins {shown(_line(text))}", AGAIN)


def _line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").splitlines()
    return lines[0][:60] if lines else ""


def _is_text(head: bytes) -> bool:
    return len(head.translate(None, _CONTROLS)) == len(head) and _decodes(head)


def _decodes(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # a character that the cut went through
    return True


def read_head(fd: int, where: str, offset: int = 0) -> bytes:
    """The first bytes of an open file, or those from an offset. Raises ResourceError."""
    try:
        return os.pread(fd, HEAD_BYTES, offset)
    except OSError as error:
        raise ResourceError("reading failed", where=where, got=error.strerror) from error


def refuse_other(head: bytes, path: Path, wanted: str) -> None:
    """Raises FormatError if a file, by its first bytes, is something known that is not ``wanted`` (``GGUF``,
    ``safetensors``); an unfinished download is told by its name too.
    """
    if not head:
        raise FormatError("the file is empty: the download failed", where=str(path), hint=AGAIN)
    if (kind := kind_of_bytes(head)) is not None:
        raise FormatError(f"not a {wanted} file: this is {kind.what}", where=str(path), hint=kind.hint)
    if path.name.lower().endswith(_UNFINISHED):
        raise FormatError(
            f"not a {wanted} file: its name is that of an unfinished download", where=str(path), hint=AGAIN
        )


def refuse_text(data: bytes, path: Path) -> None:
    """Raises FormatError if a model's text file (JSON or a template) is a pointer, an error page, an archive,
    or empty.
    """
    head = data[:HEAD_BYTES]
    if not head.strip():
        if path.suffix == ".json":
            raise FormatError("the file is empty: the download failed", where=str(path), hint=AGAIN)
        return
    kind = kind_of_bytes(head)
    if kind is None or kind.what.startswith(("a text", "a JSON text")):
        return
    if path.suffix == ".jinja" and "server's answer" in kind.what:
        return  # a template may begin with any words
    if path.suffix == ".json" and head.lstrip()[:1] == b"{" and len(data) > HEAD_BYTES:
        return
    raise FormatError(f"this is {kind.what}", where=str(path), hint=kind.hint)
