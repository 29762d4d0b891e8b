"""Folders with a tokenizer, read by transformers and by us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from krasis.runtime.text.assets import TextAssets

TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe"
ROWS = 4096
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """``folder(tokenizer={...}, config={...}, **files)``: the tiny model's text files with keys changed;
    the value ``...`` removes a key."""

    def make(
        tokenizer: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **files: Any
    ) -> Path:
        out = tmp_path / "text"
        out.mkdir()
        for name in NAMES:
            (out / name).write_bytes((TINY / name).read_bytes())
        for name, changes in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            record = json.loads((out / name).read_text("utf-8")) | (changes or {})
            record = {key: value for key, value in record.items() if value is not ...}
            (out / name).write_text(json.dumps(record), "utf-8")
        for name, record in files.items():
            (out / f"{name}.json").write_text(json.dumps(record), "utf-8")
        return out

    return make


@pytest.fixture(scope="session")
def ours() -> Callable[[Path], TextAssets]:
    """A folder's text side as the runtime reads it."""

    def read(path: Path) -> TextAssets:
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        return TextAssets.of_files(files, str(path), ROWS)

    return read


@pytest.fixture(scope="session")
def theirs() -> Callable[[Path], Any]:
    """The same by transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained
