"""How many tokens are guessed ahead of a pass: what was asked for, or what pays."""

from __future__ import annotations

import logging

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import layer_state
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)


def _goes_back(spec: ModelSpec) -> bool:
    """Whether a pass leaves what its tokens overwrite behind each of them."""
    return all(
        isinstance(layer.mixer, GatedDelta) or not layer_state(spec, layer).fixed_bytes
        for layer in dict.fromkeys(spec.layers)
    )


def not_on_gpus() -> UsageError:
    """The error for guesses that are asked for on GPUs."""
    return UsageError(
        "guessing ahead (--draft) is for the CPU in this version",
        hint="leave --draft out, or use --device cpu",
    )


def num_drafts(bundle: Bundle, settings: EngineSettings) -> int:
    """Tokens that the bundle's layer for multi-token prediction guesses on the CPU, 0 for none.

    Raises UsageError where some are asked for that cannot be had.
    """
    asked = settings.draft
    if asked == 0:
        return 0
    has_layer = bundle.manifest.spec.layers[-1].drafts and _goes_back(bundle.spec)
    if asked and not has_layer:
        raise UsageError(
            "the bundle has no layer that guesses tokens",
            where=str(bundle.path),
            got=f"--draft {asked}",
            hint="leave out --draft, or convert the model again (krasis-convert --mtp)",
        )
    if asked and settings.activations != "int8":
        raise UsageError("only the int8 kernels guess tokens", got=f'activations="{settings.activations}"')
    if asked:
        return asked
    if not has_layer or settings.activations != "int8":
        return 0
    from krasis.runtime.planning.drafting import LEAST_GAIN, draft_gain
    from krasis.runtime.planning.sizes import sizes_of_bundle

    gain = draft_gain(sizes_of_bundle(bundle.manifest), 1)
    logger.info("guessing a token ahead is expected to make decoding %.2f times as fast", gain)
    return 1 if gain >= LEAST_GAIN else 0
