"""Sizes and machines for tests of the planner, and models by hand."""

from __future__ import annotations

import dataclasses

from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Layer, Mixer, ModelSpec, Norm
from krasis.runtime.planning import ModelSizes, sizes_of_shape
from krasis.runtime.planning.sizes import ExpertSizes


def uniform_sizes(
    spec: ModelSpec,
    *,
    dense_bytes: int,
    embedding_bytes: int,
    gpu_expert_bytes: int,
    cpu_expert_bytes: int,
) -> ModelSizes:
    """A model of equal layers whose parts weigh what the arguments say."""
    (kind,) = sizes_of_shape(spec, "marlin-u4b8-gchannel-bf16").layers
    assert kind.experts is not None
    layer_bytes, end_bytes = divmod(dense_bytes, kind.count)
    experts = dataclasses.replace(kind.experts, gpu_bytes=gpu_expert_bytes, cpu_bytes=cpu_expert_bytes)
    return ModelSizes(
        spec=spec,
        layers=(dataclasses.replace(kind, dense_bytes=layer_bytes, experts=experts),),
        end_bytes=end_bytes,
        embedding_bytes=embedding_bytes,
        gpu_layout="marlin-u4b8-g128-bf16",
        cpu_layout="cpu-q8-r32-b32",
        source="shape",
    )


def with_experts(sizes: ModelSizes, **changes: object) -> ModelSizes:
    """The same with other figures of every layer's experts; ``gpu_bytes=0``: without that tier."""

    def changed(experts: ExpertSizes | None) -> ExpertSizes | None:
        return experts and dataclasses.replace(experts, **changes)  # type: ignore[arg-type]

    layers = [dataclasses.replace(kind, experts=changed(kind.experts)) for kind in sizes.layers]
    return dataclasses.replace(sizes, layers=tuple(layers))


def with_layers(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """The model with so many of its first layer."""
    return dataclasses.replace(spec, layers=spec.layers[:1] * num_layers)


MIXER = Attention(8, 2, 64, Rope(64, 1e6), 0.125)
WIDE, NARROW = Experts(32, 512, Router(4)), Experts(12, 256, Router(2), shared=GatedMlp(768))


def mixed_spec(*mixers: Mixer) -> ModelSpec:
    """Two layers of 32 experts, three of 12 smaller ones, one dense; and further mixers with a dense MLP."""
    layers = [Layer(MIXER, WIDE)] * 2 + [Layer(MIXER, NARROW)] * 3 + [Layer(MIXER, GatedMlp(1024))]
    layers += [Layer(mixer, GatedMlp(1024)) for mixer in mixers]
    return ModelSpec("mixed", 512, 4096, 65_536, Norm(1e-6), tuple(layers))
