"""What a core refuses of a request before it waits."""

from __future__ import annotations

from krasis.formats.errors import UsageError
from krasis.runtime.serving.api import ContextTooLongError, Request


def check_request(request: Request, context: int, vocab_size: int, num_slots: int) -> None:
    """Raises ContextTooLongError, and UsageError for no tokens, ids that are none, a negative limit, or a
    slot that is not there."""
    num_tokens = len(request.prompt)
    if num_tokens > context:
        raise ContextTooLongError(num_tokens, context)
    if not num_tokens:
        raise UsageError("the prompt has no tokens")
    ids = [*request.prompt, *request.logit_bias]
    worst = max(ids) if min(ids) >= 0 else min(ids)
    if not 0 <= worst < vocab_size:
        raise UsageError("a token id is outside the vocabulary", got=worst, limit=vocab_size)
    if request.max_tokens is not None and request.max_tokens < 0:
        raise UsageError("max_tokens must not be negative", got=request.max_tokens)
    if request.slot is not None and not 0 <= request.slot < num_slots:
        raise UsageError("there is no such slot", got=request.slot, limit=num_slots - 1)
