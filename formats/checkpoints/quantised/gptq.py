"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it: words of codes along the input features."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.columns import ColumnsWeight
from krasis.formats.checkpoints.quantised.kept import NO_CODES, symmetric
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors

_BITS = (2, 4, 8)
_FLOATS = ("F16", "BF16", "F32")
_V1 = ("gptq", "auto_round:auto_gptq", "auto_gptq")
_V2 = ("gptq_v2",)


@dataclass(frozen=True, slots=True)
class GptqReader:
    """group: input features a scale, None for all. zeros_less_one: as files are but those of "gptq_v2".
    ordered: which feature is of which group has to be told. symmetric: see ``ColumnsWeight``.
    """

    group: int | None
    zeros_less_one: bool
    ordered: bool = False
    symmetric: bool = False

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if not name.endswith(".qweight"):
            return None
        root = name.removesuffix("qweight")
        codes, scales, zeros = column_parts(name, tensors)
        n, (num_words, columns) = scales.shape[1], codes.shape
        bits = 32 * zeros.shape[1] // n
        if columns != n or bits not in _BITS:
            raise codes.wrong_shape(f"[.., {n}] and codes of 2, 4 or 8 bits, as its scales and zeros have")
        k = num_words * 32 // bits
        order = tensors.need(name, f"{root}g_idx") if self.ordered else tensors.find(f"{root}g_idx")
        if order is not None:
            order.check_dtype("I32", "I64")
            if order.shape != (k,):
                raise order.wrong_shape(str([k]))
        return Found(
            f"{root}weight",
            ColumnsWeight(
                dtype=f"int{bits}",
                shape=(n, k),
                codes=codes,
                scales=scales,
                zeros=zeros,
                bits=bits,
                group=group_size(scales, k, self.group, is_free=order is not None),
                group_of_column=order,
                zeros_less_one=self.zeros_less_one,
                symmetric=self.symmetric and not self.ordered,
            ),
        )


def column_parts(name: str, tensors: Tensors) -> tuple[Stored, Stored, Stored]:
    """Codes, scales and zero points beside ``X.qweight``, matrices all of them. Raises FormatError."""
    root = name.removesuffix("qweight")
    codes = tensors.codes(name, 2)
    scales, zeros = tensors.need(name, f"{root}scales"), tensors.need(name, f"{root}qzeros")
    codes.check_dtype("I32")
    zeros.check_dtype("I32")
    scales.check_dtype(*_FLOATS)
    if len(scales.shape) != 2 or 0 in scales.shape:
        raise scales.wrong_shape("[groups, output features]")
    if len(zeros.shape) != 2 or zeros.shape[0] != scales.shape[0] or 32 * zeros.shape[1] % scales.shape[1]:
        raise zeros.wrong_shape(f"[{scales.shape[0]}, words], as the scales {list(scales.shape)} have")
    return codes, scales, zeros


def group_size(scales: Stored, k: int, told: int | None, *, is_free: bool) -> int:
    """Input features a scale: what the settings say if it fits, else what divides them evenly. is_free: there
    is a list of which feature belongs where, so that any number of groups will do. Raises FormatError.
    """
    num_groups = scales.shape[0]
    if told is not None and -(-k // told) == num_groups:
        return told
    if k % num_groups and not is_free:
        raise scales.wrong_shape(f"groups of {told or k} of {k} input features")
    return -(-k // num_groups)


def told_group(settings: Settings, *names: str) -> int | None:
    """The group of the settings; None for one of all input features (-1), and where there is none."""
    if any(settings.table.get(name) == -1 for name in names):
        return None
    return settings.optional_size(*names)


def told_bits(settings: Settings, bits: tuple[int, ...], *names: str) -> None:
    """Raises UnsupportedModelError for codes of another number of bits."""
    for name in names:
        settings.expect(name, *bits)


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` gptq; a file's own ``quantize_config.json``."""
    told_bits(settings, _BITS, "bits")
    settings.expect("pack_dtype", "int32")
    settings.expect("is_marlin_format", False)
    forms = [name for name in ("checkpoint_format", "format") if settings.text(name)]
    form = settings.text(forms[0]) if forms else "gptq"
    if form not in (*_V1, *_V2):
        raise settings.refused(forms[0], form, "gptq, gptq_v2")
    group = told_group(settings, "group_size")
    ordered = settings.flag("desc_act")
    reader = GptqReader(group, form not in _V2, ordered=ordered, symmetric=settings.table.get("sym") is True)
    keeps = reader.symmetric and not ordered and settings.table.get("bits") == 4
    return Quantisation("GPTQ", (reader,), symmetric(group) if keeps else NO_CODES)
