"""Whether guessing tokens ahead pays: more rows in a pass read more experts, and fewer passes are made.

Decoding is bound by what it reads. A pass over n rows reads all but the experts once, and of a layer's E
experts, of which each token takes k, E (1 - (1 - k/E)^n): as many as n tokens choose that choose apart. A
guess besides reads the drafting layer (counted as one more layer of the model's usual kind) and the head, and
copies what each token overwrites (the matrices of Gated DeltaNet), so that a wrong one can be taken back.
"""

from __future__ import annotations

from krasis.formats.models.state import fixed_bytes
from krasis.runtime.planning.sizes import ModelSizes

ACCEPTANCE = 0.8
"""Of first guesses. DeepSeek-V3's report (arXiv 2412.19437, section 5.4.3) has 85 to 90 % for its own."""
LEAST_GAIN = 1.1  # below it, what the law leaves out may eat the gain


def distinct_experts(count: int, top_k: int, num_rows: int) -> float:
    """The experts of a layer that so many rows are expected to need."""
    return float(count * (1.0 - (1.0 - top_k / count) ** num_rows))


def tokens_a_pass(num_drafts: int, acceptance: float = ACCEPTANCE) -> float:
    """Tokens that a pass is expected to give: a guess counts if it and those before it are right."""
    return sum(acceptance**right for right in range(num_drafts + 1))


def draft_gain(
    sizes: ModelSizes, num_drafts: int, acceptance: float = ACCEPTANCE, num_answers: int = 1
) -> float:
    """How many times as fast decoding on the CPU is with guesses as without, by the bytes that it reads.
    num_answers: that a pass decodes together, each with its guesses."""

    def pass_bytes(num_rows: int) -> float:
        routed = (
            count * one.cpu_bytes * distinct_experts(one.count, one.top_k, num_rows)
            for count, one in sizes.expert_layers
        )
        return sizes.dense_bytes + sum(routed)

    layer = max(sizes.layers, key=lambda kind: kind.count if kind.experts else 0)
    experts = layer.experts
    of_experts = experts.top_k * experts.cpu_bytes if experts is not None else 0
    # The projection [hidden, 2 hidden] beside the layer's own.
    guess = layer.dense_bytes + of_experts + sizes.end_bytes + 2 * sizes.spec.hidden**2
    guess += 2 * fixed_bytes(sizes.spec)
    with_drafts = pass_bytes(num_answers * (1 + num_drafts)) + num_answers * num_drafts * guess
    return tokens_a_pass(num_drafts, acceptance) * pass_bytes(num_answers) / with_drafts
