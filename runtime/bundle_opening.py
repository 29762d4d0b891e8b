"""Opens a bundle to be run: its blobs are the architecture's, its rotary scaling is as the settings ask."""

from __future__ import annotations

from pathlib import Path

from krasis.formats.bundle.blob_names import check_blob_names
from krasis.formats.bundle.reader import Bundle
from krasis.runtime.rope_option import parse_rope_scaling, rescaled_model
from krasis.runtime.settings import EngineSettings


def open_bundle(path: Path, settings: EngineSettings) -> Bundle:
    """``Bundle.open``, and its errors. Raises FormatError besides for blobs that are not the model's,
    UsageError for a rope scaling that the model cannot have.
    """
    bundle = Bundle.open(path)
    try:
        check_blob_names(bundle.manifest, str(path))
        if settings.rope_scaling is not None:
            scaling = parse_rope_scaling(settings.rope_scaling)
            bundle.run_as(rescaled_model(bundle.spec, scaling, str(path)))
    except BaseException:
        bundle.close()
        raise
    return bundle
