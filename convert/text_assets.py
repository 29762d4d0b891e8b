"""Tokenizer, chat template and configs: copied from a checkpoint, or rebuilt from a GGUF's metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krasis.formats.checkpoints.gguf_tokenizer import tokenizer_assets
from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.files.regular_file import read_small_file

# Copied as they are. config.json is a record only: the runtime reads the manifest's architecture.
HF_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
MAX_ASSET_BYTES = 128 << 20


def assets_from_folder(folder: Path) -> tuple[dict[str, bytes], dict[str, KrasisError]]:
    """The text files of a checkpoint: name -> contents, and name -> why it cannot be read.

    A link that leads nowhere (a download that is not there) is a file that cannot be read.
    """
    found: dict[str, bytes] = {}
    unreadable: dict[str, KrasisError] = {}
    for name in HF_ASSETS:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            found[name] = read_small_file(path, MAX_ASSET_BYTES, follow_links=True)
        except KrasisError as error:
            unreadable[name] = error
            if path.is_symlink() and not path.exists():
                unreadable[name] = FormatError(
                    "the link leads to a file that is not there",
                    where=str(path),
                    hint="the download is incomplete: get the file",
                )
    return found, unreadable


def assets_from_gguf(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json rebuilt; empty without a tokenizer.

    Raises as ``formats.gguf_tokenizer.tokenizer_assets``.
    """
    return tokenizer_assets(metadata, where) if metadata.get("tokenizer.ggml.tokens") else {}
