"""The sizes of a model that decide bytes and operations, of any model whose layers are attention with an MLP
or experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import count_parameters
from krasis.formats.models.uniform import spec_of


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Where layers differ, sizes are those of the largest; ``kv_elements`` and ``dense_macs`` are sums.

    expert_layers: numbers of the layers that have experts. num_experts, num_experts_per_token,
    expert_intermediate_size: of these. mlp_intermediate: features between the products of an MLP that every
    token takes, a shared expert or a dense layer's, 0 without any; mlp_columns: what its first product gives.
    shared_gate: whether shared experts are gated. kv_elements: numbers kept of one position in all layers.
    dense_macs: multiply-adds of a token in all layers but its routed experts and attention's scores.
    num_parameters: of the whole model.
    """

    model_type: str
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
    kv_elements: int
    dense_macs: int
    num_parameters: int

    @property
    def num_expert_layers(self) -> int:
        """How many layers have experts."""
        return len(self.expert_layers)

    @property
    def expert_share(self) -> float:
        """Layers with experts, of all layers."""
        return self.num_expert_layers / self.num_layers


AnyModel = Architecture | ModelSpec | ModelShape


@lru_cache(maxsize=64)
def shape_of(model: AnyModel) -> ModelShape:
    """The shape of a model. Raises UnsupportedModelError for one with other blocks, without experts, or whose
    layers have experts of different sizes.
    """
    if isinstance(model, ModelShape):
        return model
    spec = spec_of(model) if isinstance(model, Architecture) else model
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    mlps = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, GatedMlp | Experts)]
    if len(mixers) != len(spec.layers) or len(mlps) != len(spec.layers):
        raise UnsupportedModelError("the planner does not know all of the model's blocks", got=spec.family)
    experts = [mlp for mlp in mlps if isinstance(mlp, Experts)]
    sizes = {(mlp.count, mlp.intermediate, mlp.router.top_k) for mlp in experts}
    if len(sizes) != 1:
        got = ", ".join(f"{count} experts of {width}" for count, width, _ in sorted(sizes)) or "none"
        raise UnsupportedModelError("the planner needs layers with experts, all alike", got=got)
    ((num_experts, intermediate, top_k),) = sizes
    dense = [mlp if isinstance(mlp, GatedMlp) else mlp.shared for mlp in mlps]
    columns = [_columns(mlp) for mlp in dense if mlp is not None]
    return ModelShape(
        model_type=spec.family,
        max_context=spec.max_context,
        num_layers=len(spec.layers),
        expert_layers=tuple(i for i, mlp in enumerate(mlps) if isinstance(mlp, Experts)),
        hidden_size=spec.hidden,
        vocab_size=spec.vocab,
        qkv_rows=max(_qkv_rows(mixer) for mixer in mixers),
        attention_size=max(mixer.query_rows for mixer in mixers),
        num_experts=num_experts,
        num_experts_per_token=top_k,
        expert_intermediate_size=intermediate,
        mlp_intermediate=max((mlp.intermediate for mlp in dense if mlp is not None), default=0),
        mlp_columns=max(columns, default=0),
        shared_gate=any(mlp.shared_gate for mlp in experts),
        kv_elements=sum(2 * mixer.kv_heads * mixer.head_dim for mixer in mixers),
        dense_macs=spec.hidden
        * (
            sum(_qkv_rows(mixer) + mixer.query_rows for mixer in mixers)
            + sum(mlp.count + mlp.shared_gate for mlp in experts)
            + sum(_columns(mlp) + mlp.intermediate for mlp in dense if mlp is not None)
        ),
        num_parameters=count_parameters(spec).total,
    )


def _qkv_rows(mixer: Attention) -> int:
    return mixer.query_rows + 2 * mixer.key_rows


def _columns(mlp: GatedMlp) -> int:
    return mlp.intermediate * (2 if mlp.activation.gated else 1)
