"""One declarative record of a model, from a Hugging Face ``config.json`` or GGUF metadata; the runtime reads
nothing else.

A new family adds its ``model_type`` to ``SUPPORTED_MODEL_TYPES`` and a function from its config to the
record.
"""

from krasis.formats.architecture_record import (
    SUPPORTED_MODEL_TYPES,
    Architecture,
    RopeScaling,
    check_architecture,
)
from krasis.formats.gguf_config import from_gguf_metadata
from krasis.formats.hf_config import from_hf_config, read_hf_config

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "Architecture",
    "RopeScaling",
    "check_architecture",
    "from_gguf_metadata",
    "from_hf_config",
    "read_hf_config",
]
