"""A core for a bundle."""

from __future__ import annotations

from pathlib import Path

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.serving.api import Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import BatchBackend, CoreSettings, ModelSide
from krasis.runtime.serving.prefix_folder import PrefixFolder
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.ends import TextEnds, ends_of_text


def make_core(
    bundle: Bundle,
    backend: BatchBackend,
    text: TextAssets,
    settings: CoreSettings | None = None,
    *,
    prefix_dir: Path | None = None,
    prefix_dir_bytes: int = 0,
) -> EngineCore:
    """A core that is not started. text: must have been read as far as it needs the bundle's files.

    prefix_dir: prefixes are read from there and saved there at the end, at most prefix_dir_bytes of them.
    Raises ResourceError if that folder cannot be used.
    """

    def ends(request: Request) -> TextEnds:
        return ends_of_text(
            text,
            request.prompt,
            request.stops,
            is_plain=request.is_plain,
            split=request.split_thinking,
        )

    folder = None if prefix_dir is None else PrefixFolder(prefix_dir, bundle, backend, prefix_dir_bytes)
    model = ModelSide(bundle.architecture.vocab_size, bundle.architecture.num_layers, ends)
    return EngineCore(backend, model, settings, folder)
