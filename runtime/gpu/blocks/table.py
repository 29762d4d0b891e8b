"""Which class runs which block of a model on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.spec import Layer
from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.beside import GpuMlpBesideExperts
from krasis.runtime.gpu.blocks.channel_delta import GpuChannelDelta
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
from krasis.runtime.gpu.blocks.hashed_table import GpuHashedTable
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.mamba import GpuMamba2
from krasis.runtime.gpu.blocks.mlp import GpuMlp
from krasis.runtime.gpu.blocks.rows import Block
from krasis.runtime.gpu.blocks.short_conv import GpuShortConv
from krasis.runtime.gpu.blocks.streams import GpuReadStreams, GpuWriteStreams

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel

Blocks = tuple[tuple[Block, ...], ...]
"""The blocks of each layer, in their order."""

BLOCKS: dict[type, Callable[[GpuModel, int, Any], Block]] = {
    Attention: GpuAttention,
    GatedDelta: GpuGatedDelta,
    ChannelDelta: GpuChannelDelta,
    ShortConv: GpuShortConv,
    Mamba2: GpuMamba2,
    LatentAttention: GpuLatentAttention,
    GatedMlp: GpuMlp,
    Experts: GpuExperts,
    MlpBesideExperts: GpuMlpBesideExperts,
}


def blocks_of(model: GpuModel) -> Blocks:
    """The blocks of a model. Raises UnsupportedModelError for a kind that the table lacks."""
    return tuple(
        tuple(_blocks_of_layer(model, index, layer)) for index, layer in enumerate(model.spec.layers)
    )


def _blocks_of_layer(model: GpuModel, index: int, layer: Layer) -> Iterator[Block]:
    if layer.ngram:
        yield GpuHashedTable(model, index)
    for part, name in ((layer.mixer, "attention"), (layer.mlp, "mlp")):
        if part is None:
            continue
        if model.spec.residual is None:
            yield _block(model, index, part)
        else:
            yield GpuReadStreams(model, index, name)
            yield _block(model, index, part)
            yield GpuWriteStreams(model)


def _block(model: GpuModel, layer: int, part: Any) -> Block:
    make = BLOCKS.get(type(part))
    if make is None:
        raise UnsupportedModelError(
            "no kernels yet for this block on a GPU", where=f"layer {layer}", got=type(part).__name__
        )
    return make(model, layer, part)
