"""What a model needs beyond the plainest decoder, and which backend has kernels for it: said in one sentence
before any work."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.formats.architecture_record import MAX_HEAD_DIM
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.layouts.int8_rows import STRIP_ROWS
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.mlps import Activation, Experts, GatedMlp, MlpBesideExperts, Router
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Layer, ModelSpec

_HEAD_MULTIPLE = 16  # channels
_MAX_WIDE_HEAD = 512
_MAX_INDEX_SIZE = 32768  # channels of the heads of an index together
_MOST_POOL_TOKENS = 256
_MAX_LATENT_WIDTH = 576  # of a latent and the keys' common part
_MOST_TAPS = 8  # of a convolution
_PRODUCT_MULTIPLE = 64  # channels that a product on a GPU adds up
_MAX_DELTA_DIM = 128  # channels of a head of the delta rule on a GPU
_MIXERS: dict[type, str] = {
    LatentAttention: "latent attention (MLA)",
    CompressedAttention: "compressed attention (CSA, HCA)",
    GatedDelta: "linear attention (Gated DeltaNet)",
    ChannelDelta: "linear attention (Kimi Delta Attention)",
    Mamba2: "Mamba-2 layers",
    ShortConv: "layers of short convolutions",
}
_QK_NORMS = {
    "none": "attention without norms of q and k",
    "flat": "norms over the whole q and k",
    "head_after_rope": "norms of q and k after the rotation",
    "unweighted_after_rope": "norms of q and k without weights",
}

CPU_RUNS = frozenset(
    {
        "gated residual streams",
        "mixed residual streams",
        "an index over pools",
        "compressed attention (CSA, HCA)",
        "experts chosen by the token's id",
        "hashed n-gram tables",
        "latent attention (MLA)",
        "Mamba-2 layers",
        "Mamba-2 layers whose sizes tiles do not divide",
        "layers of one block",
        "experts between two projections",
        "the activation relu_squared",
        "a soft cap on the logits",
        "an MLP beside the experts",
        "values that are keys, or normed",
        "attention heads of more than 256 channels",
        "routers that norm their input",
        "proportional rope scaling",
        "factors on embedding, residual or logits",
        "layers without experts",
        "attention in windows",
        "attention sinks",
        "attention with biases",
        "attention without norms of q and k",
        "norms over the whole q and k",
        "norms of q and k after the rotation",
        "clipped q, k and v",
        "attention with a scale of its own",
        "attention without rotation",
        "rotation of a part of each head",
        "rotation of neighbouring channels",
        "llama3 rope scaling",
        "shared experts",
        "gated attention",
        "linear attention (Gated DeltaNet)",
        "linear attention (Kimi Delta Attention)",
        "linear attention with heads of more than 128 channels",
        "layers of short convolutions",
        "the activation swiglu_offset",
        "the activation silu_clamped_before",
        "the activation silu_clamped_after",
        "the activation gelu_tanh",
        "a router of scores sigmoid",
        "a router of scores sqrt_softplus",
        "a router of scores softmax_of_top",
        "a router of scores sigmoid_of_top",
        "routers with biases, groups or scales",
        "experts with biases",
    }
)
GPU_RUNS = CPU_RUNS - {
    "mixed residual streams",
    "an index over pools",
    "compressed attention (CSA, HCA)",
    "experts chosen by the token's id",
    "Mamba-2 layers whose sizes tiles do not divide",
    "linear attention with heads of more than 128 channels",
}


def refuse_missing_kernels(spec: ModelSpec, where: str, runs: frozenset[str] = CPU_RUNS) -> None:
    """Raises UnsupportedModelError naming what the backend has no kernels for. where: the source. runs: what
    it has; the CPU's is the most.
    """
    missing = lacking(spec, runs)
    if missing:
        also = f"; it also needs {', '.join(missing[1:])}" if len(missing) > 1 else ""
        raise UnsupportedModelError(
            f"no kernels yet for {missing[0]}",
            where=where,
            hint=f"the {spec.family} model was understood, but this version cannot run it{also}",
        )


def refuse_ranks(spec: ModelSpec, num_ranks: int) -> None:
    """Raises UnsupportedModelError for a model that runs on one GPU only."""
    if num_ranks > 1 and spec.residual is not None:
        raise UnsupportedModelError(
            "models with several residual streams run on one GPU only, yet",
            where="--gpus",
            got=num_ranks,
            limit=1,
        )
    if num_ranks > 1 and any(layer.mixer is None or layer.mlp is None for layer in spec.layers):
        raise UnsupportedModelError(
            "models of layers of one block run on one GPU only, yet", where="--gpus", got=num_ranks, limit=1
        )


def refuse_long_blocks(spec: ModelSpec, context: int | None) -> None:
    """Raises UnsupportedModelError for a context in which an index over blocks would have to choose."""
    longest = spec.block_context
    if longest is not None and context is not None and context > longest:
        raise UnsupportedModelError(
            "no kernels yet for sparse attention by an index over blocks, which chooses beyond the limit",
            where="--ctx",
            got=context,
            limit=longest,
        )


def lacking(spec: ModelSpec, runs: frozenset[str]) -> list[str]:
    """What the model needs and a backend does not run, the largest first."""
    return [need for need in dict.fromkeys(needed_kernels(spec)) if need not in runs]


def needed_kernels(spec: ModelSpec) -> Iterator[str]:
    """What the model needs beyond attention and experts as Qwen3-MoE has them, the largest first."""
    layers = tuple(dict.fromkeys(spec.layers))
    for layer in layers:
        if type(layer.mixer) in _MIXERS:
            yield _MIXERS[type(layer.mixer)]
    yield from _of_model(spec)
    for layer in layers:
        yield from _of_layer(layer)


def _of_model(spec: ModelSpec) -> Iterator[str]:
    if not _has_indices(spec):
        yield "layers that take the choice of an index from no layer before, or of another budget"
    if spec.residual is not None:
        ways = {("gated", "mixer"): "gated", ("hyper", "mean"): "mixed", ("hyper", "head"): "mixed"}
        yield f"{ways.get((spec.residual.kind, spec.residual.end), 'other')} residual streams"
    if spec.ngram is not None:
        yield "hashed n-gram tables"
    if spec.norm.kind == "layer":
        yield "layer norms"
    if spec.norm.offset:
        yield "norms with weights about 0 (1 + w)"
    if spec.logits_cap is not None:
        yield "a soft cap on the logits"
    if (spec.embedding_scale, spec.residual_scale, spec.logits_scale) != (1.0, 1.0, 1.0):
        yield "factors on embedding, residual or logits"


def _has_indices(spec: ModelSpec) -> bool:
    """Whether each layer that reuses an index over tokens or pools finds the choice of one of its own kind
    and budget."""
    before: tuple[str, int, int] | None = None
    for layer in spec.layers:
        index = layer.mixer.selection if isinstance(layer.mixer, LatentAttention) else None
        if index is None or index.kind not in ("tokens", "pools"):
            continue
        own = index.kind, index.budget, index.block
        if (before is not None and own != before) or (before is None and index.reuses):
            return False
        before = own
    return True


def _of_layer(layer: Layer) -> Iterator[str]:
    if isinstance(layer.mixer, Attention):
        yield from _of_attention(layer.mixer)
    if isinstance(layer.mixer, LatentAttention):
        yield from _of_latent(layer.mixer)
    if isinstance(layer.mixer, CompressedAttention):
        yield from _of_compressed(layer.mixer)
    if isinstance(layer.mixer, GatedDelta | ChannelDelta):
        yield from _of_delta(layer.mixer)
    if isinstance(layer.mixer, ShortConv):
        yield from _of_short_conv(layer.mixer)
    if isinstance(layer.mixer, Mamba2):
        yield from _of_mamba(layer.mixer)
    if layer.mixer is None or layer.mlp is None:
        yield "layers of one block"
    if layer.parallel:
        yield "attention and experts side by side"
    if (layer.post_norms or layer.output_scale) and not isinstance(layer.mlp, MlpBesideExperts):
        yield "norms after blocks"
    if isinstance(layer.mlp, GatedMlp):
        yield "layers without experts"
        yield from _of_activation(layer.mlp)
    elif isinstance(layer.mlp, MlpBesideExperts):
        yield "an MLP beside the experts"
        yield from _of_activation(layer.mlp.mlp)
        yield from _of_experts(layer.mlp.experts)
    elif layer.mlp is not None:
        yield from _of_experts(layer.mlp)


def _of_attention(mixer: Attention) -> Iterator[str]:
    if mixer.selection is not None and mixer.selection.kind != "block_mean":  # up to its budget it picks all
        yield "sparse attention by an index"
    if mixer.chunk is not None:
        yield "attention in chunks"
    if mixer.window is not None:
        yield "attention in windows"
    if mixer.sinks:
        yield "attention sinks"
    if mixer.output_gate != "none":
        yield "gated attention" if mixer.output_gate == "channel" else "attention with gates of another kind"
        if mixer.bias:
            yield "gated attention with biases"
    if mixer.value_width != mixer.head_dim or mixer.value_scale != 1.0:
        yield "values unlike keys in size or scale"
    if mixer.shared_kv or mixer.value_norm:
        yield "values that are keys, or normed"
    if mixer.bias or mixer.output_bias:
        yield "attention with biases"
    if mixer.qk_norm != "head":
        yield _QK_NORMS[mixer.qk_norm]
    if mixer.clip is not None:
        yield "clipped q, k and v"
    if MAX_HEAD_DIM < mixer.head_dim <= _MAX_WIDE_HEAD:
        yield f"attention heads of more than {MAX_HEAD_DIM} channels"
    if mixer.head_dim > _MAX_WIDE_HEAD or mixer.head_dim % _HEAD_MULTIPLE:
        yield f"attention heads of {mixer.head_dim} channels"
    if mixer.key_rows % STRIP_ROWS:
        yield f"keys of {mixer.key_rows} channels (a multiple of {STRIP_ROWS} is needed)"
    if mixer.temperature is not None:
        yield "queries scaled by their position"
    if mixer.scale != mixer.head_dim**-0.5:
        yield "attention with a scale of its own"
    yield from _of_rope(mixer)


def _of_latent(mixer: LatentAttention) -> Iterator[str]:
    if mixer.selection is not None and mixer.selection.kind == "pools":
        yield "an index over pools"
    elif mixer.selection is not None and mixer.selection.kind != "tokens":
        yield "sparse attention by an index"
    if mixer.index_dim:
        yield from _of_token_index(mixer.selection)
    if mixer.head_gate:
        yield "latent attention with a gate for each head"
    if mixer.rope is not None and mixer.rope.place != "first":
        yield "rotation of the last channels"
    width = mixer.kv_rank + mixer.rope_dim
    if width > _MAX_LATENT_WIDTH or mixer.rope_dim % _HEAD_MULTIPLE:
        yield f"latents of {mixer.kv_rank} and {mixer.rope_dim} channels"
    for channels in (mixer.kv_rank, mixer.nope_dim, mixer.value_dim):
        if channels % STRIP_ROWS:
            yield f"latent attention of {channels} channels (a multiple of {STRIP_ROWS} is needed)"
    if mixer.rope is not None and mixer.rope.scaling.kind in ("llama3", "proportional"):
        yield f"{mixer.rope.scaling.kind} rope scaling"


def _of_compressed(mixer: CompressedAttention) -> Iterator[str]:
    if mixer.head_dim % STRIP_ROWS or mixer.group_rank % STRIP_ROWS:
        yield f"compressed attention of {mixer.head_dim} and {mixer.group_rank} channels"
    index = mixer.selection
    if index is not None and (index.kind != "tokens" or index.reuses):
        yield "compressed attention by an index of another kind"
    for rope in (mixer.rope, None if index is None else index.rope):
        if rope is not None and (rope.place != "last" or rope.style != "interleaved"):
            yield "compressed attention that turns other than the last channels"
        if rope is not None and rope.scaling.kind in ("llama3", "proportional"):
            yield f"{rope.scaling.kind} rope scaling"


def _of_token_index(index: Selection | None) -> Iterator[str]:
    if index is None:
        return
    if index.dim % _HEAD_MULTIPLE or index.dim > MAX_HEAD_DIM or index.heads * index.dim > _MAX_INDEX_SIZE:
        yield f"an index of {index.heads} heads of {index.dim} channels"
    if index.kind == "pools" and (index.budget % index.block or not 1 < index.block <= _MOST_POOL_TOKENS):
        yield f"an index of {index.budget} tokens in pools of {index.block}"
    if index.rope is not None and (index.rope.place != "first" or index.rope.dims > index.dim):
        yield "an index that turns other than its first channels"


def _of_delta(mixer: GatedDelta | ChannelDelta) -> Iterator[str]:
    if isinstance(mixer, ChannelDelta) and (mixer.decay_rank is None or mixer.gate_rank is None):
        yield "linear attention with gates of full rank"
    for dim in (mixer.key_dim, mixer.value_dim):
        if dim > MAX_HEAD_DIM or dim % _HEAD_MULTIPLE:
            yield f"linear attention with heads of {dim} channels"
        elif dim > _MAX_DELTA_DIM:
            yield f"linear attention with heads of more than {_MAX_DELTA_DIM} channels"
    if mixer.conv_width > _MOST_TAPS:
        yield f"convolutions of {mixer.conv_width} tokens"


def _of_short_conv(mixer: ShortConv) -> Iterator[str]:
    if mixer.bias:
        yield "short convolutions with biases"
    if mixer.channels % STRIP_ROWS:
        yield f"short convolutions of {mixer.channels} channels (a multiple of {STRIP_ROWS} is needed)"
    if mixer.width > _MOST_TAPS:
        yield f"convolutions of {mixer.width} tokens"


def _of_mamba(mixer: Mamba2) -> Iterator[str]:
    if mixer.bias:
        yield "Mamba-2 layers with biases"
    for dim in (mixer.head_dim, mixer.state_dim):
        if dim > MAX_HEAD_DIM or dim % _HEAD_MULTIPLE:
            yield f"Mamba-2 layers with heads or states of {dim} channels"
    if mixer.inner % _PRODUCT_MULTIPLE or (mixer.inner + mixer.conv_channels) % STRIP_ROWS:
        yield "Mamba-2 layers whose sizes tiles do not divide"
    if mixer.conv_width > _MOST_TAPS:
        yield f"convolutions of {mixer.conv_width} tokens"


def _of_rope(mixer: Attention) -> Iterator[str]:
    rope = mixer.rope
    if rope is None:
        yield "attention without rotation"
    elif rope.place != "first":
        yield "rotation of the last channels"
    else:
        if rope.dims != mixer.head_dim:
            yield "rotation of a part of each head"
        if rope.style != "half":
            yield "rotation of neighbouring channels"
    if rope is not None and rope.scaling.kind in ("llama3", "proportional"):
        yield f"{rope.scaling.kind} rope scaling"


def _of_experts(mlp: Experts) -> Iterator[str]:
    if mlp.shared is not None:
        yield "shared experts"
    if mlp.averaged:
        yield "halved sums of routed and shared experts"
    if mlp.latent is not None:
        yield "experts between two projections"
    if mlp.weigh_input:
        yield "weights on the experts' input"
    if mlp.bias:
        yield "experts with biases"
    yield from _of_activation(mlp)
    if mlp.shared is not None:
        yield from _of_activation(mlp.shared)
    yield from _of_router(mlp.router)


def _of_activation(mlp: GatedMlp | Experts) -> Iterator[str]:
    if mlp.activation != Activation():
        yield f"the activation {mlp.activation.kind}"


def _of_router(router: Router) -> Iterator[str]:
    if router.by_token:
        yield "experts chosen by the token's id"
    if router.input_norm:
        yield "routers that norm their input"
    if router.score != "softmax":
        yield f"a router of scores {router.score}"
    plain = Router(
        router.top_k, router.score, router.renormalise, by_token=router.by_token, input_norm=router.input_norm
    )
    if router != plain:
        yield "routers with biases, groups or scales"
