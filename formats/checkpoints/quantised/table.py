"""A checkpoint's tensors as if no weight were quantised: those that are have the names of plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.settings import Quantisation
from krasis.formats.checkpoints.quantised.tensors import Described, Tensors
from krasis.formats.checkpoints.quantised.weight import QuantisedWeight
from krasis.formats.errors import FormatError, UnsupportedModelError

# What belongs to the quantisation of activations, and of the cache: nothing of it is used here.
_NEEDLESS = (
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale"),
    "qscale_act",
    "output_zero_point",
)
_OF_THE_CACHE = ("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point")
_FOLDED = "pre_quant_scale"


@dataclass(frozen=True, slots=True)
class QuantisedTable:
    """weights: by the name of the plain tensor each stands for. plain: the names of all other tensors that
    are weights.
    """

    weights: Mapping[str, QuantisedWeight]
    plain: frozenset[str]


def quantised_table(quantisation: Quantisation, tensors: Tensors) -> QuantisedTable:
    """Looks at headers alone. Raises FormatError for parts that are missing or do not fit,
    UnsupportedModelError for what is not understood.
    """
    weights: dict[str, QuantisedWeight] = {}
    parts: set[str] = set()
    for name in tensors.infos:
        if name.endswith(_FOLDED):
            raise UnsupportedModelError(
                "the checkpoint is quantised in a way that Krasis does not convert",
                where=tensors.where(name),
                got="inputs are scaled before a product",
                hint="give the BF16 checkpoint it was made from, or one whose scales were folded into norms",
            )
        found = next((one for reader in quantisation.readers if (one := reader.read(name, tensors))), None)
        if found is None:
            continue
        if found.name in weights or (found.name != name and found.name in tensors.infos):
            raise FormatError("a weight is there twice, plain or in another form", where=tensors.where(name))
        weights[found.name] = found.weight
        parts.update((name, *(part.name for part in found.weight.others)))
    left = frozenset(name for name in tensors.infos if name not in parts and not _is_needless(name, tensors))
    return QuantisedTable(weights, left)


def _is_needless(name: str, tensors: Tensors) -> bool:
    last = name.rpartition(".")[2]
    if last.endswith(_NEEDLESS) or last in _OF_THE_CACHE:
        return True
    # Zero points of floats, which have none.
    info: Described = tensors.infos[name]
    return last.endswith("_zero_point") and info.dtype.startswith("F8")
