"""Models with factors on embedding, residual and logits, as models without them: nothing is left to multiply
while tokens are computed.

What blocks add is multiplied by r, so the residual is r times one that they add to without it, which begins
with the embedding divided by r. Norms divide scale out but for their eps, which becomes eps / r^2. The logits
are a product of the final norm, whose weights take their factor.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from krasis.runtime.cpu.weights import FloatArray, ModelWeights


def without_factors(weights: ModelWeights) -> ModelWeights:
    """The same model with factors of 1; the weights themselves if it has no others. Rows of the embedding
    are multiplied when they are looked up. Raises FormatError if the norms' eps would be none.
    """
    spec, embedding = weights.spec, weights.embedding
    residual, factor = spec.residual_scale, spec.embedding_scale / spec.residual_scale
    if residual == factor == spec.logits_scale == 1.0:
        return weights
    embedding = replace(embedding, factor=embedding.factor * factor)
    norm = replace(spec.norm, eps=spec.norm.eps / residual**2)
    return replace(
        weights,
        spec=replace(spec, norm=norm, embedding_scale=1.0, residual_scale=1.0, logits_scale=1.0),
        embedding=embedding,
        final_norm=weights.final_norm * spec.logits_scale,
    )


def cap_logits(logits: FloatArray, cap: float | None) -> None:
    """logits = cap tanh(logits / cap), in place; as they are without a cap."""
    if cap is None:
        return
    logits /= np.float32(cap)
    np.tanh(logits, out=logits)
    logits *= np.float32(cap)
