"""What all endpoints share: the core, the model's text, limits, and requests on their way through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.requests import Request as HttpRequest

from krasis.formats.errors import KrasisError
from krasis.runtime.server.errors import ApiError, queue_is_full, refused, shutting_down
from krasis.runtime.server.grammar import Grammars, MaskRecipe
from krasis.runtime.server.keepalive import until_disconnected
from krasis.runtime.server.metrics import Metrics
from krasis.runtime.server.prompt import Prompts
from krasis.runtime.server.sessions import Sessions, name_of
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.server.turn import Turn, of_core
from krasis.runtime.server.wire import read_object
from krasis.runtime.serving.api import Core, CoreStatus, Request
from krasis.runtime.text.assets import TOKENIZER, TextAssets

if TYPE_CHECKING:
    from krasis.runtime.server.ask import Ask
    from krasis.runtime.serving.api import Slots

T = TypeVar("T")

NUM_TEXT_THREADS = 4
_NEVER = -1e9


class ClientLeft(Exception):  # noqa: N818  no error of anybody's
    """There is nobody to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """aliases: names of the model, the first is the one that is listed. ping_interval_s: the longest silence
    of a stream. max_requests: at a time, waiting ones among them. body_timeout_s: for a request to arrive.
    template_vars: what every conversation's template is told. thought_form: see ``thought_form``. metrics:
    whether /metrics is served; slots: /slots. is_strict: requests must say which model they want. is_verbose:
    answers of chat say what the model was asked. ui: the folder of the page for browsers. sampling:
    fields of ``SamplingSettings``, in place of the model's own for requests that leave them out.
    """

    aliases: tuple[str, ...] = ("krasis",)
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_requests: int = 256
    body_timeout_s: float = 60.0
    ping_interval_s: float = 10.0
    metrics: bool = True
    is_strict: bool = False
    max_context: int | None = None
    bundle: str = ""
    thought_form: str = "auto"
    slots: bool = True
    is_verbose: bool = False
    ui: Path | None = None
    template_vars: Mapping[str, object] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Service:
    """One model, served. tokenizer_json: reads the bundle's tokenizer.json, for grammars. slots: what an
    operator may do with the core's."""

    def __init__(
        self,
        core: Core,
        assets: TextAssets,
        settings: ServeSettings,
        tokenizer_json: Callable[[], bytes],
        slots: Slots | None = None,
    ) -> None:
        self.slots = slots
        self.sampling = replace(assets.sampling, **settings.sampling)
        self.core, self.settings = core, settings
        self.replay = Replay()
        self.prompts = Prompts(assets, core.context, self.replay, settings.template_vars)
        self.grammars = Grammars(tokenizer_json, core.vocab_size, lambda: sorted(assets.end_tokens.ids))
        self.metrics = Metrics(core.status, settings.aliases[0])
        self.closing = asyncio.Event()
        self._pool = ThreadPoolExecutor(NUM_TEXT_THREADS, "text")
        self._num_open = 0
        self._sessions = Sessions()
        self._token_text = lru_cache(maxsize=65536)(self._decode_one)

    # ---- requests ------------------------------------------------------------------------------------------

    async def read(self, request: HttpRequest) -> dict[str, Any]:
        """A request's object. Raises ApiError, also if the server is closing or has too many requests."""
        if self.closing.is_set():
            raise shutting_down()
        if self._num_open >= self.settings.max_requests:
            raise queue_is_full(10)
        return await read_object(request, self.settings.max_body_bytes, self.settings.body_timeout_s)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What function gives: rendering and tokenizing take milliseconds, in which streams must go on."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def begin(self, ask: Ask, http: HttpRequest) -> Turn:
        """Submits to the core. Raises ApiError."""
        if self.closing.is_set():
            raise shutting_down()
        session = name_of(http.headers, ask.session)
        request = Request(
            id=ask.number("req_"),
            prompt=ask.prompt,
            sampling=ask.sampling,
            max_tokens=ask.max_tokens,
            stops=ask.stops,
            is_plain=ask.is_plain,
            split_thinking=not ask.is_plain,
            ignore_ends=ask.ignore_ends,
            logprobs=ask.num_logprobs,
            sampled_logprobs=ask.sampled_logprobs,
            prompt_logprobs=ask.num_prompt_logprobs,
            logit_bias=ask.bias,
            make_mask=self._make_mask(ask),
            use_cache=ask.use_cache,
            slot=ask.slot,
            side=self._sessions.is_side(session, has_tools=bool(ask.choice.tools), is_task=ask.is_task),
            conversation=session,
        )
        try:
            ticket = self.core.submit(request)
        except KrasisError as error:
            raise of_core(error) from error
        self._num_open += 1
        return Turn(
            ask,
            ticket,
            replay=self.replay,
            token_text=self._token_text,
            closing=self.closing,
            metrics=self.metrics,
            on_close=self._one_less,
        )

    def begin_all(self, asks: Sequence[Ask], http: HttpRequest) -> list[Turn]:
        """Submits all or none. Raises ApiError."""
        turns: list[Turn] = []
        try:
            turns += (self.begin(ask, http) for ask in asks)
        except ApiError:
            for turn in turns:
                turn.close()
            raise
        return turns

    async def whole(self, http: HttpRequest, turns: Sequence[Turn], work: Coroutine[Any, Any, T]) -> T:
        """An answer in one piece; its work ends when the client leaves. Raises ClientLeft."""
        try:
            found = await until_disconnected(http.receive, work)
        finally:
            for turn in turns:
                turn.close()
        if found is None:
            raise ClientLeft
        return found

    def _one_less(self) -> None:
        self._num_open -= 1

    def _make_mask(self, ask: Ask) -> MaskRecipe | None:
        if ask.grammar is None:
            return None
        return MaskRecipe(ask.grammar, ask.closes, self.grammars, self._decode_all)

    async def status(self) -> CoreStatus:
        """The core's figures; streams go on until it has said them."""
        return await asyncio.to_thread(self.core.status)

    # ---- the model -----------------------------------------------------------------------------------------

    def model_name(self, value: Any) -> str:
        """The model as the client calls it: whatever it says is answered by the one that is here."""
        if (value is None or value == "") and self.settings.is_strict:
            raise refused("'model' is missing.", "model", "missing_required_parameter")
        if value is None or value == "":
            return self.settings.aliases[0]
        if not isinstance(value, str):
            raise refused("'model' must be a string.", "model", "invalid_type")
        return value[:256]

    def call_openers(self) -> dict[int, float]:
        """A bias against the token that begins a call, if it is one token."""
        found = self.prompts.assets.tokenizer.token_id(self.prompts.call_format.openers[0])
        return {} if found is None else {found: _NEVER}

    def token_text(self, token: int) -> str:
        """A token's text, special or not."""
        return self._token_text(token)

    def _decode_one(self, token: int) -> str:
        return self.prompts.assets.tokenizer.decode([token], skip_special=False)

    def _decode_all(self, tokens: Any) -> str:
        return self.prompts.assets.tokenizer.decode(list(tokens), skip_special=False)

    def close(self) -> None:
        """Ends all streams with an error; the core is the caller's to close."""
        self.closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def service_of(request: HttpRequest) -> Service:
    """The service behind a request."""
    return cast("Service", request.app.state.service)


__all__ = ["TOKENIZER", "ApiError", "ClientLeft", "ServeSettings", "Service", "service_of"]
