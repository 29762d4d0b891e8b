"""One declarative record of a model, from a Hugging Face ``config.json`` or GGUF metadata.

It is a view of the description in ``formats/models`` for models whose layers are all alike. The readers are
imported on first use: a bundle needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.architecture_record import (
    SUPPORTED_MODEL_TYPES,
    Architecture,
    RopeScaling,
    check_architecture,
)

if TYPE_CHECKING:
    from krasis.formats.checkpoints.gguf_config import from_gguf_metadata
    from krasis.formats.checkpoints.hf_config import from_hf_config, read_hf_config

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "Architecture",
    "RopeScaling",
    "check_architecture",
    "from_gguf_metadata",
    "from_hf_config",
    "read_hf_config",
]

_HOMES = {
    "from_gguf_metadata": "checkpoints.gguf_config",
    "from_hf_config": "checkpoints.hf_config",
    "read_hf_config": "checkpoints.hf_config",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"krasis.formats.{_HOMES[name]}"), name)
