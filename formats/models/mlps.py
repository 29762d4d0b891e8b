"""Blocks that work on each token alone: gated MLPs, routed experts and their routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from krasis.formats.models.record import MAX_EXPERTS, MAX_HIDDEN, Record, fail, number, required, size

ActivationKind = Literal[
    "silu", "gelu_tanh", "swiglu_offset", "silu_clamped_before", "silu_clamped_after", "relu_squared", "situ"
]
Score = Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_of_top", "sigmoid_of_top"]


@dataclass(frozen=True, slots=True)
class Activation(Record):
    """What stands between up (u), gate (g) and down.

    ``silu``: silu(g) u. ``gelu_tanh``: gelu(g) u. ``swiglu_offset``: g <= limit, u in +-limit, then
    g sigmoid(alpha g) (u + 1). ``silu_clamped_before``: silu(min(g, limit)) clip(u). ``silu_clamped_after``:
    min(silu(g), limit) clip(u). ``relu_squared``: relu(u)^2, without a gate. ``situ``: alpha tanh(g / alpha)
    sigmoid(g) limit tanh(u / limit).
    """

    kind: ActivationKind = "silu"
    limit: float = number(0.0, 1e9, 0.0)
    alpha: float = number(0.0, 1e9, 1.0)

    @property
    def gated(self) -> bool:
        """Whether there is a gate matrix."""
        return self.kind != "relu_squared"


@dataclass(frozen=True, slots=True)
class GatedMlp(Record):
    """down(activation(gate x, up x)) of one width, for every token."""

    KIND: ClassVar[str] = "mlp"
    intermediate: int = size(MAX_HIDDEN)
    activation: Activation = Activation()
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Router(Record):
    """How a token's experts and their weights come about.

    Scores of the logits (of all, or ``_of_top`` after the choice); with correction_bias they are chosen by
    score + bias but weigh by the score alone. Of ``groups`` groups the best ``top_groups`` stay, by the sum
    of their two best or by their best. renormalise: weights are divided by max(sum, sum_floor) + sum_epsilon.
    scale: times the weights. bias: of the logits. logit_cap: cap * tanh(logits / cap). by_token: the experts
    come from a table of the token's id. input_norm: logits of scale * rms(x) / sqrt(hidden), of the residual
    itself. expert_scale: a factor an expert on its weight.
    """

    top_k: int = size(MAX_EXPERTS)
    score: Score = "softmax"
    renormalise: bool = True
    scale: float = number(1e-9, 1e9, 1.0)
    bias: bool = False
    correction_bias: bool = False
    groups: int = size(MAX_EXPERTS, 1, 1)
    top_groups: int = size(MAX_EXPERTS, 1, 1)
    group_score: Literal["best_two", "best"] = "best_two"
    sum_floor: float = number(0.0, 1.0, 0.0)
    sum_epsilon: float = number(0.0, 1.0, 0.0)
    logit_cap: float | None = number(1e-6, 1e9, None)
    by_token: bool = False
    input_norm: bool = False
    expert_scale: bool = False

    def check(self) -> None:
        if self.top_groups > self.groups:
            raise fail(
                "more groups are chosen than there are", self, "top_groups", self.top_groups, self.groups
            )


@dataclass(frozen=True, slots=True)
class Experts(Record):
    """Routed experts, each down(activation(gate x, up x)), with what every token takes besides.

    shared: an MLP on the same input, added (shared_gate: times a sigmoid of one projection). latent: experts
    work between two projections to this width. weigh_input: the weight multiplies the input, not the output.
    averaged: routed and shared outputs are halved.
    """

    KIND: ClassVar[str] = "experts"
    count: int = size(MAX_EXPERTS)
    intermediate: int = size(MAX_HIDDEN)
    router: Router = required()
    activation: Activation = Activation()
    bias: bool = False
    shared: GatedMlp | None = None
    shared_gate: bool = False
    latent: int | None = size(MAX_HIDDEN, 1, None)
    weigh_input: bool = False
    averaged: bool = False

    def check(self) -> None:
        if self.router.top_k > self.count:
            raise fail(
                "more experts a token than there are", self, "router.top_k", self.router.top_k, self.count
            )
        if self.count % self.router.groups:
            raise fail(
                "experts do not divide into groups",
                self,
                "count",
                self.count,
                f"a multiple of {self.router.groups}",
            )
        if self.shared_gate and self.shared is None:
            raise fail("a gate without a shared expert", self, "shared_gate", True, False)

    @property
    def gated(self) -> bool:
        """Whether each expert has a gate matrix."""
        return self.activation.gated

    def width(self, hidden: int) -> int:
        """Of what experts work on, in a model of that hidden size."""
        return hidden if self.latent is None else self.latent


@dataclass(frozen=True, slots=True)
class MlpBesideExperts(Record):
    """A dense MLP and experts on the same residual, each with norms before and after, their sum normed again
    (Gemma 4).
    """

    KIND: ClassVar[str] = "mlp_beside_experts"
    mlp: GatedMlp
    experts: Experts
