"""An engine as a server knows it, that is no process: its host is a thread here, its backend a script."""

from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from krasis.runtime.server.engine.channel import Channel
from krasis.runtime.server.engine.host import EngineHost
from krasis.runtime.server.engine.life import EngineLife
from krasis.runtime.server.engine.remote_core import RemoteCore
from krasis.runtime.server.engine.restarts import Restarts
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings, ModelSide
from tests.support.letters import ends
from tests.support.patience import PATIENCE_S
from tests.support.scripted_backend import NUM_LAYERS, ScriptedBackend


class EngineThread:
    """See ``launch.Engine``. ``kill`` does what SIGKILL does, as far as the server sees."""

    def __init__(self, backend: ScriptedBackend, recipe: Any, loaded: Event) -> None:
        ours, theirs = socket.socketpair()
        self.backend = backend
        self.left: list[int] = []  # the exit code of an engine that did not wait for its step
        self.channel = Channel(ours, "orders")
        self._theirs = Channel(theirs, "answers")
        self.core = EngineCore(backend, ModelSide(backend.vocab, NUM_LAYERS, ends), CoreSettings(num_slots=2))
        self._recipe, self._loaded = recipe, loaded
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._loaded.wait(PATIENCE_S)
        self.core.start()
        EngineHost(self.core, None, self._theirs, self._recipe, leave=self.left.append).serve()

    def ending(self) -> str:
        return "killed by a test"

    def kill(self) -> None:
        self._theirs.abandon()
        self.channel.abandon()


class Engines:
    """Starts them. made: those that were. opening: called before each, and may raise. loaded: cleared, they
    are not ready."""

    def __init__(self, make: Callable[[], ScriptedBackend] = ScriptedBackend) -> None:
        self._make = make
        self.made: list[EngineThread] = []
        self._lives: list[EngineLife] = []
        self.contexts: list[int | None] = []
        self.opening: Callable[[], object] = lambda: None
        self.recipe: Any = None
        self.loaded = Event()
        self.loaded.set()

    def __call__(self, context: int | None) -> EngineThread:
        self.contexts.append(context)
        self.opening()
        self.made.append(EngineThread(self._make(), self.recipe, self.loaded))
        return self.made[-1]

    def core(self, *, pauses_s: tuple[float, ...] | None = (0.0, 0.0), **options: Any) -> RemoteCore:
        """A core that they compute for."""
        life = EngineLife(self, None if pauses_s is None else Restarts(pauses_s))
        self._lives.append(life)
        life.begin()
        return RemoteCore(life, **{"max_waiting": 4, **options})

    def close(self) -> None:
        """Ends them, so that none is started again; no thread of theirs is left."""
        for life in self._lives:
            life.close(save_prefixes=False)
        for one in self.made:
            one.core.close()
