"""Models with factors on embedding, residual and logits, as models without them: nothing is left to multiply
while tokens are computed.

What blocks add is multiplied by r, so the residual is r times one that they add to without it, which begins
with the embedding divided by r. Norms divide scale out but for their eps, which becomes eps / r^2. The logits
are a product of the final norm, whose weights take their factor.
"""

from __future__ import annotations

from dataclasses import replace

from krasis.runtime.cpu.weights import FloatWeight, ModelWeights, to_float32


def without_factors(weights: ModelWeights) -> ModelWeights:
    """The same model with factors of 1; the weights themselves if it has no others.

    The embedding becomes a copy in float32, vocabulary x hidden x 4 bytes. Raises FormatError if the norms'
    eps would be none.
    """
    spec, embedding = weights.spec, weights.embedding
    residual, factor = spec.residual_scale, spec.embedding_scale / spec.residual_scale
    if residual == factor == spec.logits_scale == 1.0:
        return weights
    if factor != 1.0:
        table = to_float32(embedding.data, embedding.dtype)
        table *= factor
        embedding = FloatWeight(table, "F32")
    norm = replace(spec.norm, eps=spec.norm.eps / residual**2)
    return replace(
        weights,
        spec=replace(spec, norm=norm, embedding_scale=1.0, residual_scale=1.0, logits_scale=1.0),
        embedding=embedding,
        final_norm=weights.final_norm * spec.logits_scale,
    )
