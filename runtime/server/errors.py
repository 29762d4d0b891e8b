"""What goes wrong with a request, as each API says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from krasis.formats.errors import FormatError, KrasisError, ResourceError, UnsupportedModelError, UsageError

MAX_RETRY_AFTER_S = 120  # clients do not wait any longer
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """A request's end. status: of HTTP, if nothing was sent yet. extra: further fields of OpenAI's object.

    message: one sentence. param: the field at fault. retry_after_s: when to come again.
    anthropic_message: for that API's clients, who look for other words. kind: OpenAI's ``type``, if it is not
    the status' own.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    anthropic_message: str = ""
    kind: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, min(self.retry_after_s, MAX_RETRY_AFTER_S)))}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def openai(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _OPENAI_TYPES.get(self.status) or (
            "invalid_request_error" if self.status < 500 else "server_error"
        )
        kind = self.kind or kind
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.extra}
        return {"error": body}

    def anthropic(self) -> dict[str, Any]:
        """Anthropic's error object."""
        kind = _ANTHROPIC_TYPES.get(self.status) or (
            "invalid_request_error" if self.status < 500 else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": self.anthropic_message or self.message}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served as it is."""
    return ApiError(400, message, code, param)


def too_long(num_prompt_tokens: int, context: int) -> ApiError:
    """400 in the words by which agents know that they must shorten the conversation."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, your messages resulted in "
        f"{num_prompt_tokens} tokens: the request exceeds the available context size. Please shorten the "
        "messages.",
        "context_length_exceeded",
        "messages",
        anthropic_message=f"prompt is too long: {num_prompt_tokens} tokens > {context} maximum",
        kind="exceed_context_size_error",  # llama.cpp's, by which its clients know
        extra={"n_prompt_tokens": num_prompt_tokens, "n_ctx": context},
    )


def queue_is_full(retry_after_s: float) -> ApiError:
    """429: come again."""
    wait = max(1, min(round(retry_after_s), MAX_RETRY_AFTER_S))
    return ApiError(429, "The server's queue is full; try again later.", "queue_full", retry_after_s=wait)


def shutting_down() -> ApiError:
    """503, also in the middle of a stream."""
    return ApiError(503, "The server is shutting down.", "shutting_down", retry_after_s=10)


def engine_lost(message: str, retry_after_s: float) -> ApiError:
    """503, also in the middle of a stream: the engine's process has ended."""
    return ApiError(503, message, "engine_lost", retry_after_s=max(1, round(retry_after_s)))


def from_krasis(error: KrasisError, param: str | None = None) -> ApiError:
    """What the rest of the program says of a request, as an answer to it."""
    message = " ".join(str(error).split())
    if isinstance(error, UsageError | FormatError):
        # A template's refusal and a tokenizer's failure come from what the request has in it.
        return ApiError(400, message, None, param)
    if isinstance(error, UnsupportedModelError):
        return ApiError(501, message)
    if isinstance(error, ResourceError):
        return ApiError(503, message, retry_after_s=10)
    return ApiError(500, message)


def internal() -> ApiError:
    """500: a fault of this program. What it was is in the log, and not for strangers."""
    return ApiError(500, "The server failed on this request; its log says why.", "internal_error")
