"""The library's face: opens a bundle, computes logits, generates text. One conversation at a time, from any
thread."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.process.stages import stage
from krasis.runtime.backend import Backend, Logits
from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.exclusive import Cancellation, Claim, Exclusive
from krasis.runtime.generation import Answer, Generation, GenerationPlan, Piece, StopStrings, run
from krasis.runtime.held_tokens import HeldTokens
from krasis.runtime.host.prefault import Prefault, files_of_tiers, start_prefault
from krasis.runtime.layer_progress import Progress as Progress
from krasis.runtime.loading import Loads
from krasis.runtime.open_backend import open_backend
from krasis.runtime.sampler import Sampler
from krasis.runtime.settings import EngineSettings, SamplingSettings
from krasis.runtime.stops import stop_texts
from krasis.runtime.template_values import Variables, merged_variables, refuse_variables
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.chat import Message, missing_template
from krasis.runtime.text.ends import TextEnds, ends_of_text
from krasis.runtime.text.messages import read_messages, render_chat, token_ids
from krasis.runtime.user_files import check_length
from krasis.runtime.wider_cache import usable

logger = logging.getLogger(__name__)

MakeBackend = Callable[[Bundle, EngineSettings], Backend]
Prompt = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, Any]]


class Engine:
    """A bundle ready to run. Use ``Engine.open``; close it, or use ``with``.

    ``tokens`` are the ids whose keys and values the cache holds. load_s: seconds ``open`` took.

    Any thread may call: calls take turns, in the order they came, and an answer's piece is one call. There is
    one cache, so the newest call wins: an answer that was begun and then finds ``tokens`` changed by another
    call (an answer, prefill, decode, truncate, reset, load_prefix) ends with a UsageError. A progress
    callback may call ``cancel`` and no other method. All of them raise UsageError once the engine is closed,
    and in a child of ``fork``.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, settings: EngineSettings, text: TextAssets | None = None
    ) -> None:
        """text: what was begun to be read already; None: read from the bundle when it is needed."""
        self.bundle = bundle
        self.text = text or TextAssets(bundle, settings.chat_template)
        self.load_s = 0.0
        self._gate = Exclusive()
        self._held = HeldTokens(bundle, backend, settings, self._gate)
        self._prefault: Prefault | None = None

    @classmethod
    def open(
        cls, path: str | Path, settings: EngineSettings | None = None, make_backend: MakeBackend | None = None
    ) -> Engine:
        """Maps a bundle and makes it ready; time does not depend on its size.

        make_backend: what opens the backend; None: the registry, by the settings.
        Raises FormatError for a damaged bundle, UnsupportedModelError, ResourceError, and NativeError for a
        missing library.
        """
        settings = settings or EngineSettings()
        begin = time.perf_counter()
        with ExitStack() as undo:
            with stage("open the bundle"):
                bundle = undo.enter_context(open_bundle(Path(path), settings))
                text = TextAssets(bundle, settings.chat_template)
                text.prepare()
            tiers = ("dense", settings.experts)
            if settings.reread:
                bundle.drop_cached(files_of_tiers(bundle, tiers))  # before anything is mapped
            with stage("open the backend"):
                backend = (make_backend or open_backend)(bundle, settings)
            undo.callback(backend.close)
            engine = cls(bundle, backend, settings, text)
            engine._held.reopen = functools.partial(make_backend or open_backend, bundle)
            if settings.prefault:
                engine._prefault = start_prefault(bundle, tiers, backend)
            undo.pop_all()
        engine.load_s = time.perf_counter() - begin
        logger.info("opened %s in %.3f s: %s", path, engine.load_s, engine._backend.description)
        return engine

    @property
    def settings(self) -> EngineSettings:
        """What it was opened with; another ``kv_dtype`` once an F16 cache has overflowed."""
        return self._held.settings

    @property
    def _backend(self) -> Backend:
        return self._held.backend

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        return self.bundle.architecture

    @property
    def description(self) -> str:
        """One line: what runs the model, and how."""
        return self._backend.description

    def wait_until_read(self) -> None:
        """Returns when the weights that are read in the background are in memory, as far as they will be."""
        self._gate.check()
        prefault = self._prefault  # another thread may close the engine meanwhile, which ends the reading
        if prefault is not None:
            prefault.wait()

    @property
    def loading(self) -> tuple[str, int, int] | None:
        """What is loaded in the background now, and how much of it: (what, bytes, bytes in all)."""
        backend, prefault = self._backend, self._prefault
        if isinstance(backend, Loads) and backend.is_loading:
            return "experts pinned", *backend.load_progress()
        read = None if prefault is None else prefault.progress()
        return None if read is None else ("weights read", *read)

    @property
    def huge_page_share(self) -> float | None:
        """The share of the weights in memory that huge pages map, 0 to 1; None while they are being read, if
        they are not read ahead, or if they are too few for it to matter.
        """
        prefault = self._prefault
        return prefault.huge_share if prefault is not None else None

    @property
    def placement(self) -> tuple[str, str]:
        """Where the last prompt was computed and where tokens are decoded, a few words each."""
        return self._backend.placement

    @property
    def context(self) -> int:
        """Tokens the cache can hold."""
        return self._backend.capacity

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of one pass."""
        return self._backend.prefill_chunk

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids computed so far."""
        return tuple(self._held.tokens)

    def prefill(
        self, tokens: Sequence[int], *, all_logits: bool = False, progress: Progress | None = None
    ) -> Logits:
        """Computes tokens after those held; gives f32 logits [vocab] of the last, or [len(tokens), vocab] of
        all.

        Raises UsageError for no tokens, an id outside the vocabulary, or too many for the context;
        CallCancelledError after ``cancel``: then the passes done so far are held.
        """
        cancellation = Cancellation()
        return self._gate.run(cancellation, self._held.prefill, tokens, cancellation, all_logits, progress)

    def decode(self, token: int) -> Logits:
        """Computes one token; gives its logits [vocab]. Raises as ``prefill``."""
        return self._gate.run(None, self._decode_copy, token)

    def _decode_copy(self, token: int) -> Logits:
        # Another thread's call may overwrite the backend's own before this caller has looked at them.
        return self._held.decode(token).copy()

    def cancel(self) -> None:
        """Ends the answer or the prefill in progress, soon (a prompt: after a layer); does not wait for it.

        An answer then ends as after ``Answer.cancel``, ``prefill`` raises CallCancelledError, and ``tokens``
        are what was computed. May be called from any thread, a progress callback or a signal handler; without
        anything in progress it does nothing.
        """
        self._gate.cancel()

    def truncate(self, num_tokens: int) -> None:
        """Forgets all but the first num_tokens tokens, or some more where the model's state cannot be taken
        back to there. Raises UsageError if fewer are held.
        """
        self._gate.run(None, self._held.truncate, num_tokens)

    def reset(self) -> None:
        """Forgets everything."""
        self._gate.run(None, self._held.truncate, 0)

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Keeps what the cache shares with tokens, but not the last of them; gives how many were kept.

        The last token is always left to compute: its logits are what comes next.
        """
        return self._gate.run(None, self._held.keep_prefix, tokens)

    def save_prefix(self, path: str | Path, *, conversation: bytes = b"") -> None:
        """Writes the tokens held and their keys and values to a file, which appears complete or not at all.

        conversation: kept along, for ``load_prefix`` to give back. An older saved prefix of that name is
        replaced. Raises UsageError if there is nothing to save or another file of that name, ResourceError if
        the system refuses.
        """
        self._gate.run(None, self._held.save_prefix, path, conversation)

    def load_prefix(self, path: str | Path) -> bytes:
        """Goes on from a saved prefix instead of what is held now; gives the conversation saved along.

        What is computed next has the same bits as if nothing had been in between. Raises MismatchError for a
        prefix of another bundle or KV dtype, UsageError if it is longer than the context, FormatError
        (ChecksumError, VersionError) for a file that is not a sound one; what is held is then still held.
        """
        return self._gate.run(None, self._held.load_prefix, path)

    def encode(self, prompt: Prompt, *, template_vars: Variables | None = None) -> list[int]:
        """Token ids of plain text, of messages (by the chat template), or of ids (as they are).

        Messages are dicts, ``Message`` or other objects with role and content, as APIs send them: content may
        be a list of text parts, an assistant may have tool_calls. template_vars: what the template is told
        beside the messages, on top of the settings' ones. Raises UsageError for what is none of these, for
        text that is not UTF-8 or far beyond the context, for messages if the bundle has no chat template, or
        for a variable that the program sets itself.
        """
        self._gate.check()
        if isinstance(prompt, str):
            refuse_variables(template_vars)
            check_length(prompt, self.context, self.text.tokenizer)
            return self.text.tokenizer.encode(prompt, special=True)
        if (ids := token_ids(prompt)) is not None:
            refuse_variables(template_vars)
            return ids
        messages = read_messages(prompt)
        tokenizer = self.text.tokenizer
        if self.text.template is None:
            raise missing_template(str(self.bundle.path))
        check_length(messages, self.context, tokenizer)
        variables = merged_variables(self.settings.template_vars, template_vars)
        self.text.note_unused(variables)
        return tokenizer.encode(render_chat(self.text.template, messages, variables=variables))

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingSettings | None = None,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        progress: Progress | None = None,
        template_vars: Variables | None = None,
        split_thinking: bool = True,
    ) -> Answer:
        """Text that follows the prompt, piece by piece; ``.stats`` of the result has counts and times.

        What the cache already holds of the prompt is not computed again. sampling: None = as
        generation_config.json suggests. max_tokens: None = until an end token or the context is full. stop:
        one text or several, or special tokens, that end the text, be it answer or thinking. template_vars: as
        for ``encode``. split_thinking: what the model thinks comes as pieces of the kind ``reasoning``;
        False: all is answer, with the markers as far as decoding shows them.
        Raises UsageError if the prompt does not fit the context.
        """
        stop = stop_texts(stop)
        ids = self.encode(prompt, template_vars=template_vars)
        if not ids or len(ids) > self.context:
            self._held.refuse_length(len(ids), 0)
        stats = Generation(num_prompt_tokens=len(ids))
        limit = self.context if max_tokens is None else max_tokens
        if limit < 1:
            raise UsageError("max_tokens must be positive", got=max_tokens)
        if sampling is None:
            self.text.note_sampling()
            sampling = self.text.sampling
        text_ends = ends_of_text(self.text, ids, stop, is_plain=isinstance(prompt, str), split=split_thinking)
        cancellation = Cancellation()
        pieces = self._generate(ids, sampling, limit, text_ends, progress, stats, cancellation)
        return Answer(pieces, stats, self._gate, cancellation)

    def _generate(
        self,
        ids: list[int],
        sampling: SamplingSettings,
        max_tokens: int,
        ends: TextEnds,
        progress: Progress | None,
        stats: Generation,
        cancellation: Cancellation,
    ) -> Generator[Piece]:
        """Goes on only inside ``_gate``, and only with what it has left in the cache."""
        claim = Claim(self._gate)
        stats.num_cached_tokens = kept = self._held.keep_prefix(ids)
        stats.drafts = self._held.count_drafts()
        plan = GenerationPlan(
            first=lambda: usable(
                claim.begin(self._held.prefill, ids[kept:], cancellation, False, progress), self._backend
            ),
            step=lambda token: usable(claim.go_on(self._held.decode, token), self._backend),
            context=self._held.tokens,
            room=self.context - len(ids),
            sampler=Sampler(sampling),
            stream=ends.stream,
            end_tokens=ends.end_tokens,
            stops=StopStrings(ends.stops.texts, ends.stops.signs.values()),
            max_tokens=max_tokens,
            stop_tokens=ends.stops.ids,
            splitter=ends.splitter,
        )
        yield from run(plan, stats)

    def close(self) -> None:
        """Frees threads and mappings. Calling it again does nothing.

        Ends an answer or prefill that another thread has in progress, as ``cancel``, and waits till that
        thread has left; the reader of the answer gets a UsageError. A file that is being saved or loaded is
        waited for. Raises UsageError inside a callback, which cannot be waited for. In a child of ``fork`` it
        frees nothing, since nothing there is the child's.
        """
        self._gate.close(self._free)

    def _free(self) -> None:
        with stage("close the engine"), ExitStack() as undo:  # each of them, whatever the others raise
            undo.callback(self.bundle.close)
            undo.callback(self._backend.close)
            prefault, self._prefault = self._prefault, None
            if prefault is not None:
                prefault.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
