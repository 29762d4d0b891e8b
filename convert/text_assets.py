"""Tokenizer, chat template and configs: copied from a checkpoint, or rebuilt from a GGUF's metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krasis.formats.gguf_tokenizer import tokenizer_assets
from krasis.formats.regular_file import read_small_file

# Copied as they are. config.json is a record only: the runtime reads the manifest's architecture.
HF_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",
)
MAX_ASSET_BYTES = 128 << 20


def assets_from_folder(folder: Path) -> dict[str, bytes]:
    """The text files of a checkpoint that exist. Raises FormatError for one beyond the bound or no file,
    ResourceError for one that the system refuses.
    """
    found: dict[str, bytes] = {}
    for name in HF_ASSETS:
        path = folder / name
        # A link that leads nowhere is a download that is not complete, and no model without a tokenizer.
        if os.path.lexists(path):
            found[name] = read_small_file(path, MAX_ASSET_BYTES, follow_links=True)
    return found


def assets_from_gguf(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json rebuilt; empty without a tokenizer.

    Raises as ``formats.gguf_tokenizer.tokenizer_assets``.
    """
    return tokenizer_assets(metadata, where) if metadata.get("tokenizer.ggml.tokens") else {}
