"""Recognises how a checkpoint's weights are quantised, by the settings that come with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from krasis.formats.checkpoints.quantised import awq, compressed_tensors, fp4, fp8, gptq, modelopt
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised_checkpoint import FIELDS, refuse_quantised
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.strict_json import parse_json_object

Recognise = Callable[[Settings], Quantisation]


def _auto_round(settings: Settings) -> Quantisation:
    """AutoRound writes the forms of others."""
    settings.expect("packing_format", "auto_round:auto_gptq", "auto_round:auto_awq")
    recognise = awq.recognise if settings.text("packing_format") == "auto_round:auto_awq" else gptq.recognise
    return recognise(settings)


METHODS: dict[str, Recognise] = {
    "fp8": fp8.recognise,
    "fbgemm_fp8": fp8.recognise,
    "mxfp8": fp8.recognise,
    "mxfp4": fp4.recognise,
    "compressed-tensors": compressed_tensors.recognise,
    "modelopt": modelopt.recognise,
    "modelopt_fp4": modelopt.recognise,
    "modelopt_mixed": modelopt.recognise,
    "gptq": gptq.recognise,
    "gptqmodel": gptq.recognise,
    "awq": awq.recognise,
    "auto-round": _auto_round,
    "auto_round": _auto_round,
    "intel/auto-round": _auto_round,
}
_SIDE_FILES: dict[str, Recognise] = {
    "hf_quant_config.json": modelopt.recognise,
    "quantize_config.json": gptq.recognise,
    "quant_config.json": awq.recognise,
}


def quantisation_of(config: Mapping[str, Any], where: str) -> Quantisation | None:
    """How the weights are quantised that a ``config.json`` describes; None if it does not say so.

    Raises UnsupportedModelError, naming the format or the setting, for one that is not read, FormatError for
    settings that are none.
    """
    nested = config.get("text_config")
    tables = [(config, where), *([(nested, f"{where}: text_config")] if isinstance(nested, Mapping) else [])]
    for table, place in tables:
        for field in FIELDS:
            value = table.get(field)
            if value is None or value == {}:
                continue
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            recognise = METHODS.get(method.lower()) if isinstance(method, str) else None
            if recognise is None:
                refuse_quantised(table, place)
            else:
                return recognise(Settings(value, f"{place}: {field}", Path(where).parent.name))
    return None


def quantisation_beside(folder: Path) -> Quantisation | None:
    """The same of a file beside a ``config.json`` that says nothing. None if there is no such file, or none
    that is understood: it may lie beside sound weights.
    """
    for name, recognise in _SIDE_FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            data = read_small_file(path, MAX_CONFIG_BYTES, follow_links=True)
            return recognise(
                Settings(
                    parse_json_object(data, str(path), max_bytes=MAX_CONFIG_BYTES), str(path), folder.name
                )
            )
        except (FormatError, UnsupportedModelError):
            return None
    return None
