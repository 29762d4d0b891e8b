"""The sizes that GPU buffers and tables are made for: where layers differ, those of the largest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.limits import align_up
from krasis.formats.models.mixer_tensors import mixer_tensors
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.state import state
from krasis.formats.models.uniform import spec_of
from krasis.runtime.planning import latent_workspace

_WITH_STATES = GatedDelta | ChannelDelta | ShortConv | Mamba2
_MIXERS = Attention | LatentAttention | _WITH_STATES | None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """expert_layers: numbers of the layers that have experts. num_experts, num_experts_per_token,
    expert_intermediate_size: of these. qkv_rows, attention_size: features that a mixer's projections give,
    and those of its result. mlp_intermediate: features between the products of an MLP that every token
    takes, a shared expert's or a dense layer's, 0 without any; mlp_columns: what its first product gives.
    shared_gate: whether shared experts are gated. delta_channels: 16-bit columns of a token between the
    projections of a recurrent layer, as ``_mixed_columns`` has them; delta_heads: of the gated delta rule, 0
    without any. gate_columns: float32 columns of a token beside such layers' projections. has_states: whether
    rows of a sequence go through a state one after another anywhere.
    qkv_columns: 16-bit columns of a token between a mixer's projections on a GPU. kv_bytes: of one token's
    keys and values in a layer's cache. latent_heads, latent_rank: of latent attention, and expanded_bytes
    what its heads' keys and values take at a time, 0 without any; index: of its indices over tokens.
    post_norms: whether there are norms after blocks. gated_experts: whether experts have a gate matrix.
    latent_experts: what experts between two projections work on, 0 of others.
    window: the most positions that a layer with a window sees, window_bytes: the most of one token's keys
    and values there; 0 without such layers.
    streams, stream_rank: of a gated residual, 0 of a plain one. table_columns: what a token looks up in
    hashed tables.
    """

    max_context: int
    num_layers: int
    expert_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    qkv_rows: int
    attention_size: int
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    mlp_intermediate: int
    mlp_columns: int
    shared_gate: bool
    qkv_columns: int
    delta_channels: int = 0
    delta_heads: int = 0
    gate_columns: int = 0
    has_states: bool = False
    latent_heads: int = 0
    latent_rank: int = 0
    expanded_bytes: int = 0
    index: latent_workspace.IndexShape | None = None
    post_norms: bool = False
    kv_bytes: int = 0
    gated_experts: bool = True
    latent_experts: int = 0
    window: int = 0
    window_bytes: int = 0
    streams: int = 0
    stream_rank: int = 0
    table_columns: int = 0

    @property
    def num_expert_layers(self) -> int:
        """How many layers have experts."""
        return len(self.expert_layers)

    @property
    def expert_width(self) -> int:
        """Of what experts read and give."""
        return self.latent_experts or self.hidden_size


AnyModel = Architecture | ModelSpec | ModelShape


@lru_cache(maxsize=64)
def shape_of(model: AnyModel) -> ModelShape:
    """The shape of a model of attention with MLPs or experts, all of these alike. Raises
    UnsupportedModelError for another: buffers and tables of the runtime have one size for all layers.
    """
    if isinstance(model, ModelShape):
        return model
    spec = _spec(model)
    known = (
        isinstance(layer.mixer, _MIXERS)
        and isinstance(layer.mlp, GatedMlp | Experts | MlpBesideExperts | None)
        for layer in dict.fromkeys(spec.layers)
    )
    if not all(known):
        raise UnsupportedModelError("the runtime does not know all of the model's blocks", got=spec.family)
    experts = [layer.experts for layer in spec.layers if layer.experts is not None]
    sizes = {(mlp.count, mlp.intermediate, mlp.router.top_k, mlp.gated, mlp.latent) for mlp in experts}
    if len(sizes) != 1:
        got = ", ".join(f"{count} experts of {width}" for count, width, *_ in sorted(sizes)) or "none"
        raise UnsupportedModelError("the layers' experts are not all alike", got=got)
    return largest_shape(spec)


@lru_cache(maxsize=64)
def largest_shape(model: AnyModel) -> ModelShape:
    """The shape that has room for every layer of a model."""
    if isinstance(model, ModelShape):
        return model
    spec = _spec(model)
    kinds = tuple(dict.fromkeys(spec.layers))
    mixed = [_mixer_columns(spec, layer) for layer in kinds]
    experts = [layer.experts for layer in kinds if layer.experts is not None]
    dense = [mlp for layer in kinds for mlp in _dense_mlps(layer)]
    deltas = [layer.mixer for layer in kinds if isinstance(layer.mixer, GatedDelta | ChannelDelta | Mamba2)]
    windowed = [mixer for layer in kinds if isinstance(mixer := layer.mixer, Attention) and mixer.window]
    chunked = [mixer for mixer in deltas if isinstance(mixer, GatedDelta)]
    latent = [layer.mixer for layer in kinds if isinstance(layer.mixer, LatentAttention)]
    return ModelShape(
        max_context=spec.max_context,
        num_layers=len(spec.layers),
        expert_layers=tuple(i for i, layer in enumerate(spec.layers) if layer.experts is not None),
        hidden_size=spec.hidden,
        vocab_size=spec.vocab,
        qkv_rows=max(inner for inner, _ in mixed),
        attention_size=max(output for _, output in mixed),
        num_experts=max((mlp.count for mlp in experts), default=0),
        num_experts_per_token=max((mlp.router.top_k for mlp in experts), default=0),
        expert_intermediate_size=max((mlp.intermediate for mlp in experts), default=0),
        mlp_intermediate=max((mlp.intermediate for mlp in dense), default=0),
        mlp_columns=max((mlp.intermediate * (1 + mlp.activation.gated) for mlp in dense), default=0),
        shared_gate=any(mlp.shared_gate for mlp in experts),
        delta_channels=max(map(_mixed_columns, deltas), default=0),
        delta_heads=max((mixer.value_heads for mixer in chunked), default=0),
        gate_columns=max(map(_gate_columns, deltas), default=0),
        has_states=any(isinstance(layer.mixer, _WITH_STATES) for layer in kinds),
        qkv_columns=max(_gpu_columns(spec, layer) for layer in kinds),
        latent_heads=max((mixer.heads for mixer in latent), default=0),
        latent_rank=max((mixer.kv_rank for mixer in latent), default=0),
        expanded_bytes=max(
            (latent_workspace.expanded_bytes(mixer, spec.max_context) for mixer in latent), default=0
        ),
        index=latent_workspace.index_shape(latent),
        post_norms=any(layer.post_norms for layer in kinds),
        kv_bytes=max(sum(one.entry_bytes for one in state(layer.mixer).kept) for layer in kinds),
        gated_experts=all(mlp.gated for mlp in experts),
        latent_experts=max((mlp.latent or 0 for mlp in experts), default=0),
        window=max((mixer.window or 0 for mixer in windowed), default=0),
        window_bytes=max(
            (round(state(replace(mixer, window=None)).token_bytes) for mixer in windowed), default=0
        ),
        **_residual(spec),
    )


def _residual(spec: ModelSpec) -> dict[str, int]:
    residual, table = spec.residual, spec.ngram
    if residual is None or residual.kind != "gated":
        return {}
    columns = 0 if table is None else table.dim * sum(layer.ngram for layer in spec.layers)
    return {"streams": residual.streams, "stream_rank": residual.rank, "table_columns": columns}


def spec_of_bundle(bundle: Any) -> ModelSpec:
    """The model of a bundle, or of its manifest."""
    spec: ModelSpec | None = getattr(bundle, "spec", None)
    return spec_of(bundle.architecture) if spec is None else spec


def _spec(model: Architecture | ModelSpec) -> ModelSpec:
    return spec_of(model) if isinstance(model, Architecture) else model


def _mixer_columns(spec: ModelSpec, layer: Layer) -> tuple[int, int]:
    """(what a mixer's projections give, what goes into the last of them, which gives the residual's)."""
    if layer.mixer is None:
        return 0, 0
    packed = [one for one in mixer_tensors(layer.mixer, spec, normed=False) if one.store == "int8_rows"]
    outputs = [one for one in packed if one.name.endswith((".output", ".output_b"))]
    inner = sum(one.shape[0] for one in packed if one not in outputs)
    return inner, max(one.shape[1] for one in outputs)


def _mixed_columns(mixer: GatedDelta | ChannelDelta | Mamba2) -> int:
    """16-bit columns of a token: a convolution's channels, and of Mamba-2 what the scan gives in float32."""
    return mixer.conv_channels + (2 * mixer.inner if isinstance(mixer, Mamba2) else 0)


def _gate_columns(mixer: GatedDelta | ChannelDelta | Mamba2) -> int:
    """With those of the low rank in between, which begin aligned."""
    if isinstance(mixer, Mamba2):
        return mixer.heads
    if isinstance(mixer, GatedDelta):
        return 2 * mixer.value_heads
    return (
        align_up(mixer.heads, 4)
        + 2 * mixer.heads * mixer.dim
        + max(mixer.decay_rank or 0, mixer.gate_rank or 0)
    )


def _gpu_columns(spec: ModelSpec, layer: Layer) -> int:
    if isinstance(layer.mixer, LatentAttention):
        return latent_workspace.qkv_columns(layer.mixer)
    return _mixer_columns(spec, layer)[0]


def _dense_mlps(layer: Layer) -> list[GatedMlp]:
    """The MLPs that every token of a layer takes."""
    mlp = layer.mlp
    beside = [mlp.mlp] if isinstance(mlp, MlpBesideExperts) else []
    if isinstance(mlp, GatedMlp):
        beside.append(mlp)
    experts: Experts | None = layer.experts
    if experts is not None and experts.shared is not None:
        beside.append(experts.shared)
    return beside
