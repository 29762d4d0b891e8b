"""Training text that every Python installation carries: its own standard library.

Four streams come out of one walk over the library: `code` (modules), `tests` (test modules),
`docs` (language topics and docstrings as plain English) and `chat` (questions with the docstring
or the source as the answer, in ChatML). The modules and topics of `HELD_OUT` and `VALIDATION`
reach no stream.
"""

import ast
import hashlib
import inspect
import logging
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from scripts.models.tiny_model.chat_pairs import ChatPair, definition_pairs, greeting_pairs, topic_pairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holdout:
    """Modules (file names without `.py`, at the library's top level) and topics kept out."""

    modules: tuple[str, ...]
    topics: tuple[str, ...]


# Reported as "held-out perplexity", written to heldout.txt, never trained on.
HELD_OUT = Holdout(
    modules=(
        "calendar",
        "colorsys",
        "fractions",
        "graphlib",
        "mimetypes",
        "netrc",
        "sched",
        "shlex",
    ),
    topics=(
        "bitwise",
        "comparisons",
        "del",
        "identifiers",
        "lambda",
        "naming",
        "slicings",
        "while",
    ),
)
# Chooses the checkpoint that is kept; apart from HELD_OUT, so that the figure reported for
# HELD_OUT is not one that anything was selected by.
VALIDATION = Holdout(
    modules=("bisect", "cmd", "plistlib", "wave"),
    topics=("exprlists", "nonlocal", "raise", "yield"),
)

MAX_HELD_OUT_BYTES = 200_000
MAX_TEST_FILE_BYTES = 200_000
MIN_LEAK_PARAGRAPH_CHARS = 80
SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload", "data"})
TEST_DIRS = frozenset({"test", "tests", "idle_test", "test_importlib"})
# Character tables teach nothing but digits.
TABLE_FILES = frozenset({"html/entities.py", "stringprep.py", "pydoc_data/topics.py"})
KEPT_ENCODINGS = frozenset({"__init__.py", "aliases.py", "idna.py", "utf_8_sig.py", "utf_16.py"})

STREAM_WEIGHTS = {"code": 0.40, "tests": 0.10, "docs": 0.20, "chat": 0.30}


@dataclass(slots=True)
class Corpus:
    """Documents by stream, and the two texts kept apart.

    `streams` maps a stream's name to its documents; `chat` documents are ChatML already.
    """

    streams: dict[str, list[str]]
    held_out: str
    validation: str
    num_files: int
    num_bytes: int
    sha256: str
    stdlib: Path
    pairs: list[ChatPair] = field(default_factory=list)

    def documents(self) -> Iterator[str]:
        """All training documents, for training the tokenizer."""
        for documents in self.streams.values():
            yield from documents


def default_stdlib() -> Path:
    """The running Python's library folder."""
    return Path(sysconfig.get_path("stdlib"))


def is_test_path(path: PurePosixPath) -> bool:
    """Whether a path relative to the library belongs to a test suite."""
    return bool(TEST_DIRS.intersection(path.parts[:-1])) or path.name.startswith("test_")


def _is_wanted(path: PurePosixPath, size_bytes: int) -> bool:
    if SKIPPED_DIRS.intersection(path.parts) or str(path) in TABLE_FILES:
        return False
    if path.parts[0].startswith("config-"):
        return False
    if path.parts[0] == "encodings":
        return path.name in KEPT_ENCODINGS
    return not (is_test_path(path) and size_bytes > MAX_TEST_FILE_BYTES)


def source_files(stdlib: Path) -> Iterator[tuple[PurePosixPath, str]]:
    """Yield (relative path, text) of wanted UTF-8 `.py` files, sorted, each content once."""
    seen: set[bytes] = set()
    for file in sorted(stdlib.rglob("*.py"), key=lambda item: item.relative_to(stdlib).as_posix()):
        path = PurePosixPath(file.relative_to(stdlib).as_posix())
        if not file.is_file() or not _is_wanted(path, file.stat().st_size):
            continue
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            logger.debug("left out, not UTF-8: %s", path)
            continue
        if digest in seen or not text.strip():
            continue
        seen.add(digest)
        yield path, text.replace("\r\n", "\n")


def module_name(path: PurePosixPath) -> str:
    """`email/message.py` -> `email.message`; a package's `__init__` is the package."""
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def holdout_of(path: PurePosixPath) -> Holdout | None:
    """Which held-back set a file belongs to; its tests go with the module."""
    stem = path.stem.removeprefix("test_") if is_test_path(path) else str(path.with_suffix(""))
    for holdout in (HELD_OUT, VALIDATION):
        if stem in holdout.modules:
            return holdout
    return None


def read_topics(stdlib: Path) -> dict[str, str]:
    """The language reference as pydoc carries it: topic -> plain text (empty if not installed)."""
    file = stdlib / "pydoc_data" / "topics.py"
    if not file.is_file():
        logger.warning("no pydoc_data/topics.py in %s: training without language topics", stdlib)
        return {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return {name: text.strip("\n") for name, text in sorted(topics.items())}
    raise ValueError(f"{file}: no dict literal of topics found")


def paragraphs(text: str) -> list[str]:
    """Text between blank lines."""
    return [part for part in text.split("\n\n") if part.strip()]


def _leak_key(paragraph: str) -> str | None:
    squeezed = " ".join(paragraph.split())
    return squeezed if len(squeezed) >= MIN_LEAK_PARAGRAPH_CHARS else None


def leak_keys(texts: Iterable[str]) -> frozenset[str]:
    """Normalised long paragraphs of held-back texts; topics quote each other at length."""
    keys = (_leak_key(part) for text in texts for part in paragraphs(text))
    return frozenset(key for key in keys if key is not None)


def without_leaks(text: str, keys: frozenset[str]) -> str:
    """The text less every paragraph that a held-back text contains."""
    return "\n\n".join(part for part in paragraphs(text) if _leak_key(part) not in keys)


def docstring_page(name: str, tree: ast.Module) -> str:
    """A module's docstrings as one page of plain text; empty when it has none."""
    parts: list[str] = []
    text = ast.get_docstring(tree)
    if text:
        parts.append(f"Module {name}\n\n{text}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node, clean=False)
        if doc and not node.name.startswith("_"):
            head = node.name
            if not isinstance(node, ast.ClassDef):
                head = f"{node.name}({ast.unparse(node.args)})"
            parts.append(f"{head}\n\n{inspect.cleandoc(doc)}")
    return "\n\n".join(parts)


@dataclass(slots=True)
class _Gathered:
    code: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    docs: list[str] = field(default_factory=list)
    pairs: list[ChatPair] = field(default_factory=list)
    kept_back: dict[Holdout, list[str]] = field(default_factory=dict)
    num_files: int = 0
    num_bytes: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def _parse(path: PurePosixPath, text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        logger.debug("not parsed, used as text only: %s (%s)", path, error)
        return None


def _gather_files(stdlib: Path, max_files: int | None) -> _Gathered:
    out = _Gathered()
    for path, text in source_files(stdlib):
        holdout = holdout_of(path)
        if holdout is not None:
            if not is_test_path(path):
                out.kept_back.setdefault(holdout, []).append(text)
            continue
        if max_files is not None and out.num_files >= max_files:
            continue
        out.num_files += 1
        out.num_bytes += len(text)
        out.digest.update(f"{path}\0{text}\0".encode())
        if is_test_path(path):
            out.tests.append(text)
            continue
        out.code.append(text)
        tree = _parse(path, text)
        if tree is not None:
            page = docstring_page(module_name(path), tree)
            if page:
                out.docs.append(page)
            out.pairs.extend(definition_pairs(module_name(path), tree, text))
    return out


def _interleave(modules: list[str], topics: list[str]) -> str:
    """One text that changes between Python and English, so that any prefix holds both."""
    mixed: list[str] = []
    for index in range(max(len(modules), len(topics))):
        mixed.extend(texts[index] for texts in (modules, topics) if index < len(texts))
    return "\n\n".join(text.strip("\n") for text in mixed) + "\n"


def _clip(text: str, limit_bytes: int) -> str:
    raw = text.encode()
    if len(raw) <= limit_bytes:
        return text
    return raw[: raw.rfind(b"\n", 0, limit_bytes) + 1].decode()


def build_corpus(seed: int, stdlib: Path | None = None, *, max_files: int | None = None) -> Corpus:
    """Read the library and make every stream.

    `max_files` bounds the number of modules (for tests). Raises ValueError when the folder holds
    no held-out module, which means that it is not a standard library.
    """
    root = default_stdlib() if stdlib is None else stdlib
    got = _gather_files(root, max_files)
    if HELD_OUT not in got.kept_back or VALIDATION not in got.kept_back:
        raise ValueError(f"{root}: none of {HELD_OUT.modules} there; not a standard library?")
    topics = read_topics(root)
    kept = {h: [topics[t] for t in h.topics if t in topics] for h in (HELD_OUT, VALIDATION)}
    keys = leak_keys(text for texts in (*kept.values(), *got.kept_back.values()) for text in texts)
    back = {*HELD_OUT.topics, *VALIDATION.topics}
    trained = {n: without_leaks(t, keys) for n, t in topics.items() if n not in back}
    got.pairs.extend(topic_pairs(trained))
    got.pairs.extend(greeting_pairs())
    random.Random(seed).shuffle(got.pairs)
    for text in trained.values():
        got.digest.update(text.encode())
        got.num_bytes += len(text)
    streams = {
        "code": [without_leaks(text, keys) + "\n" for text in got.code],
        "tests": [without_leaks(text, keys) + "\n" for text in got.tests],
        "docs": [*trained.values(), *(without_leaks(text, keys) for text in got.docs)],
        "chat": [pair.chatml() for pair in got.pairs],
    }
    held_out = _clip(_interleave(got.kept_back[HELD_OUT], kept[HELD_OUT]), MAX_HELD_OUT_BYTES)
    return Corpus(
        streams=streams,
        held_out=held_out,
        validation=_interleave(got.kept_back[VALIDATION], kept[VALIDATION]),
        num_files=got.num_files,
        num_bytes=got.num_bytes,
        sha256=got.digest.hexdigest(),
        stdlib=root,
        pairs=got.pairs,
    )
