"""AWQ, as AutoAWQ's GEMM form has it: words of eight output features in an interleaved order."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.columns import AWQ_ORDER, ColumnsWeight
from krasis.formats.checkpoints.quantised.gptq import column_parts, group_size, told_bits, told_group
from krasis.formats.checkpoints.quantised.kept import NO_CODES, symmetric
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors


@dataclass(frozen=True, slots=True)
class AwqReader:
    """group: input features a scale, None for all. symmetric: see ``ColumnsWeight``."""

    group: int | None
    symmetric: bool = False

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if not name.endswith(".qweight"):
            return None
        codes, scales, zeros = column_parts(name, tensors)
        (k, words), n = codes.shape, scales.shape[1]
        if words * 8 != n:
            raise codes.wrong_shape(f"[.., {n // 8}], as its scales {list(scales.shape)} have")
        if zeros.shape[1] != words:
            raise zeros.wrong_shape(f"[{scales.shape[0]}, {words}]")
        return Found(
            f"{name.removesuffix('qweight')}weight",
            ColumnsWeight(
                dtype="int4",
                shape=(n, k),
                codes=codes,
                scales=scales,
                zeros=zeros,
                bits=4,
                group=group_size(scales, k, self.group, is_free=False),
                along_inputs=False,
                order=AWQ_ORDER,
                symmetric=self.symmetric,
            ),
        )


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` awq; a file's own ``quant_config.json``."""
    told_bits(settings, (4,), "bits", "w_bit")
    for name in ("version", "format", "checkpoint_format"):
        form = settings.text(name)
        if form not in (None, "gemm", "awq", "auto_round:auto_awq"):
            raise settings.refused(name, form, "gemm")
    group = told_group(settings, "group_size", "q_group_size")
    reader = AwqReader(group, symmetric=settings.table.get("zero_point") is False)
    return Quantisation("AWQ", (reader,), symmetric(group) if reader.symmetric else NO_CODES)
