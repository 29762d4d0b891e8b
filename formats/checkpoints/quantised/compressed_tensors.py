"""Settings of compressed-tensors (vLLM's, and llm-compressor's): groups of modules, each with its format."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.formats.checkpoints.quantised.fp4 import Fp4Reader
from krasis.formats.checkpoints.quantised.fp8 import BytesReader
from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes, symmetric
from krasis.formats.checkpoints.quantised.packed_int import PACKED_BITS, PackedReader, PackedScheme
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised.tensors import Reader

_FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` compressed-tensors."""
    settings.expect("format", *_FORMATS)
    settings.inner("sparsity_config").expect("format", "dense")
    if settings.inner("transform_config").inner("config_groups").table:
        raise settings.refused("transform_config", "rotations", "none")
    groups = settings.inner("config_groups")
    bytes_blocks: list[tuple[int, int]] = []
    integers: list[tuple[int, int]] = []
    packed: list[PackedScheme] = []
    asymmetric: list[bool] = []
    names: list[str] = []
    for group in (groups.inner(name) for name in groups.table):
        weights = group.inner("weights")
        if not weights.table:
            continue  # of activations alone
        group.expect("format", *_FORMATS)
        form = group.text("format") or settings.text("format")
        kind, bits = weights.choice("type", {"int": "int", "float": "float"}, "int"), weights.size("num_bits")
        block = _block(weights)
        names.append(f"{'FP' if kind == 'float' else 'INT'}{bits}")
        if kind == "float":
            weights.expect("num_bits", 4, 8)
            bytes_blocks += [block] if block and bits == 8 else []
        elif form == "pack-quantized":
            weights.expect("num_bits", *PACKED_BITS)
            packed.append(_packed(weights, bits, block))
        else:
            asymmetric.append(not weights.flag("symmetric", default=True))
            weights.expect("num_bits", 8)
            integers += [block] if block else []
    name = ", ".join(["compressed-tensors", *dict.fromkeys(names)])
    readers = tuple(_readers(bytes_blocks, integers, all(asymmetric or [False]), packed))
    return Quantisation(name, readers, _kept(packed, names, settings.text("format")))


def _kept(packed: list[PackedScheme], names: list[str], form: str | None) -> KeptCodes:
    """What all groups have in common."""
    if form == "mxfp4-pack-quantized" and set(names) == {"FP4"}:
        return KeptCodes(mxfp4=True)
    groups = {one.group for one in packed if one.bits == 4 and one.symmetric and not one.ordered}
    alike = len(groups) == 1 and set(names) == {"INT4"} and len(packed) == len(names)
    fits = alike and all(one.symmetric and not one.ordered for one in packed)
    return symmetric(groups.pop()) if fits else NO_CODES


def _packed(weights: Settings, bits: int, block: tuple[int, int] | None) -> PackedScheme:
    # Ordered "statically" (by weight), features keep their places.
    ordered = weights.table.get("actorder") is True or weights.table.get("actorder") in ("group", "dynamic")
    symmetric = weights.flag("symmetric", default=True)
    return PackedScheme(bits, None if block is None else block[1], symmetric, ordered)


def _block(weights: Settings) -> tuple[int, int] | None:
    """(rows, columns) that a scale is for; None for a row or a matrix."""
    strategy = weights.text("strategy")
    if strategy not in (None, "tensor", "channel", "group", "tensor_group", "block"):
        raise weights.refused("strategy", strategy, "tensor, channel, group, tensor_group, block")
    if strategy == "block" or (strategy is None and weights.has("block_structure")):
        return weights.pair("block_structure")
    if strategy in ("tensor", "channel") or weights.table.get("group_size") in (None, -1):
        return None
    return 1, weights.size("group_size")


def _readers(
    blocks: list[tuple[int, int]],
    integers: list[tuple[int, int]],
    asymmetric: bool,
    packed: list[PackedScheme],
) -> Iterator[Reader]:
    """All of them: a module's tensors tell which group it is of."""
    yield BytesReader(tuple(dict.fromkeys(blocks)))
    yield BytesReader(tuple(dict.fromkeys(integers)), integers=True, asymmetric=asymmetric)
    if packed:
        yield PackedReader(tuple(dict.fromkeys(packed)))
    yield Fp4Reader()
