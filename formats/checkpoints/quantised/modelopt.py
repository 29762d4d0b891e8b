"""Settings of NVIDIA ModelOpt, in ``config.json`` or in ``hf_quant_config.json`` beside it."""

from __future__ import annotations

from krasis.formats.checkpoints.quantised.fp4 import Fp4Reader
from krasis.formats.checkpoints.quantised.fp8 import MX_BLOCK, BytesReader
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings

_BLOCK = (128, 128)
_ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"),
    *("MXFP4", "W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"),
)


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` modelopt."""
    if settings.has("quantization"):
        settings = settings.inner("quantization")
    names = [_algorithm(settings, "MIXED_PRECISION")]
    layers = settings.inner("quantized_layers")
    if names == ["MIXED_PRECISION"]:
        names += [_algorithm(layers.inner(name)) for name in layers.table]
    used = ", ".join(dict.fromkeys(name for name in names if name))
    # Without an algorithm too: a file beside config.json may have it, and a cache's leaves the weights plain.
    readers = (BytesReader((_BLOCK, MX_BLOCK)), Fp4Reader())
    return Quantisation(f"NVIDIA ModelOpt, {used}" if used else "NVIDIA ModelOpt", readers)


def _algorithm(settings: Settings, *more: str) -> str:
    """The algorithm; an empty text where none is told."""
    settings.expect("quant_algo", *_ALGORITHMS, *more)
    return str(settings.table.get("quant_algo") or "")
