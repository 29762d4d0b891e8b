"""Checkpoints whose weights are quantised already, in formats that are not read: which it is, and what to
take. ``quantised`` has the formats that are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.names import shown

# quant_method, lower case, without separators -> how people call it
_METHODS = {
    "fp8": "FP8",
    "fbgemmfp8": "FP8 (FBGEMM)",
    "deepspeedfp8": "FP8 (DeepSpeed)",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "gptqmodel": "GPTQ",
    "autoround": "AutoRound",
    "intelautoround": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "compressedtensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "quark": "AMD Quark",
    "hqq": "HQQ",
    "quanto": "quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "torchao": "torchao",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "bitnet": "BitNet",
    "sinq": "SINQ",
    "fpquant": "FP-Quant",
    "mlx": "MLX",
}
_ALGORITHM = re.compile(rb'"quant_algo"\s*:\s*"([A-Za-z0-9_]{1,40})"')
# Words of a folder's name that say that it is the quantised form, as publishers append them.
_SUFFIXES = (
    *("-fp8", "-fp8-dynamic", "-nvfp4", "-fp4", "-mxfp4", "-awq", "-awq-int4", "-gptq", "-gptq-int4"),
    *("-gptq-int8", "-int4", "-int8", "-4bit", "-8bit", "-bnb-4bit", "-w4a16", "-w8a8", "-w8a16", "-exl2"),
    *("-exl3", "-autoround", "-int4-autoround", "-mlx"),
)
# Files that other tools put the same into.
SIDE_FILES = {
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quanto_qmap.json": "quanto",
}

# Fields of a config.json that hold settings of a quantisation.
FIELDS = ("quantization_config", "compression_config", "quantization")


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedModelError if a ``config.json`` says that the weights are quantised."""
    for field in FIELDS:
        value = config.get(field)
        if value is None or value == {}:
            continue
        name = _name(value, field)
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({name}), which Krasis does not convert",
            where=f"{where}: {field}",
            hint=f"{way_out(Path(where).parent.name)}; if its weights are BF16 after all, remove that field",
        )


def refuse_side_files(folder: Path) -> None:
    """Raises UnsupportedModelError if a file beside a silent ``config.json`` says that the weights are
    quantised. For weights that were found unusable: such a file may lie beside sound ones too.
    """
    for file, name in SIDE_FILES.items():
        if not (folder / file).is_file():
            continue
        data = read_small_file(folder / file, MAX_CONFIG_BYTES, follow_links=True)
        algorithm = _ALGORITHM.search(data)
        detail = f", {algorithm.group(1).decode()}" if algorithm else ""
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({name}{detail}), which Krasis does not convert",
            where=str(folder / file),
            hint=way_out(folder.name),
        )


def type_hint(dtype: str) -> str:
    """What to do about weights of a type that only quantised checkpoints have."""
    kind = "FP8 weights" if dtype.startswith("F8") else "packed or quantised weights"
    return f"these are {kind}, and no quantization_config says what they mean: {way_out('')}"


def _name(value: Any, field: str) -> str:
    if not isinstance(value, Mapping):
        return f"{field} {shown(value, 40)}"
    method = value.get("quant_method")
    if method is None:
        if "bits" in value and "group_size" in value and field == "quantization":
            return f"MLX, {shown_number(value['bits'])} bits"
        if value.get("load_in_4bit") is True or value.get("load_in_8bit") is True:
            method = "bitsandbytes"
        else:
            method = value.get("quant_algo") or value.get("format") or value.get("quant_type")
    if not isinstance(method, str) or not method:
        return "in a format that its settings do not name"
    name = _METHODS.get(method.lower().replace("-", "").replace("_", "").replace("/", ""), shown(method, 40))
    details = [_detail(value)] if _detail(value) else []
    return ", ".join([name, *details])


def _detail(value: Mapping[str, Any]) -> str:
    """What a person looks for beside the method: the layout of compressed-tensors, the bits, FP8's blocks."""
    layout = value.get("format") or value.get("quant_algo")
    if isinstance(layout, str) and layout and layout != value.get("quant_method"):
        return layout if layout.isprintable() and len(layout) <= 40 else shown(layout, 40)
    bits = value.get("bits", value.get("w_bit"))
    if bits is not None:
        return f"{shown_number(bits)} bits"
    block = value.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2:
        return f"blocks of {shown_number(block[0])} x {shown_number(block[1])}"
    return ""


def shown_number(value: Any) -> str:
    """A number as it is, anything else as ``shown`` has it."""
    return str(value) if isinstance(value, int | float) else shown(value, 20)


def way_out(folder: str) -> str:
    """The way out, with the name of the unquantised checkpoint where the folder's tells it."""
    lower = folder.lower()
    suffix = max((word for word in _SUFFIXES if lower.endswith(word)), key=len, default="")
    named = f", probably {shown(folder[: -len(suffix)])}" if suffix and len(folder) > len(suffix) else ""
    return f"give the BF16 checkpoint it was made from{named}, or a GGUF of the model (Q8_0 loses least)"
