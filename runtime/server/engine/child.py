"""The program of an engine's process: opens what it is told to, and serves one channel.

It heeds no signal that a terminal or a service manager sends to all: the server, which gets them too, says
when to end. It ends with the server however that ends, since then the channel closes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krasis.runtime.server.engine.channel import Channel
    from krasis.runtime.server.engine.order import EngineOrder
    from krasis.runtime.server.grammar import Grammar, MaskRecipe
    from krasis.runtime.serving.opening import OpenedCore

NAME = "krasis-engine"


def main(descriptor: int) -> None:
    """The process. descriptor: of its end of the pair of sockets."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(NAME, "ascii")  # how ps and the kernel's log call it
    end = socket.socket(fileno=descriptor)
    end.set_inheritable(False)
    sys.setswitchinterval(1e-4)  # messages and steps must not wait for each other
    from krasis.runtime.server.engine.channel import Channel

    channel = Channel(end, "answers")
    from krasis.runtime.text.sandbox import shared_sandbox

    shared_sandbox().start()  # it gets ready while this process imports
    from krasis.runtime.server.engine.errors_told import told
    from krasis.runtime.serving import opening

    logging.getLogger(__name__).debug("the engine has %s", opening.__name__)
    message = channel.receive()
    if message is None:
        return
    try:
        failure = _run(channel, message[0])
    except Exception as error:
        logging.getLogger(__name__).debug("the engine cannot be opened", exc_info=True)
        channel.send({"is": "failed", "error": told(error)})
        failure = error
    channel.finish()
    sys.exit(failure is not None)


def _run(channel: Channel, said: dict[str, object]) -> BaseException | None:
    from krasis.formats.files import mapping_guard
    from krasis.runtime.server.engine.host import EngineHost
    from krasis.runtime.server.engine.order import EngineOrder

    order = EngineOrder.of_json(said)
    _configure_logging(order.log_level)
    mapping_guard.install(order.program)
    is_open = Event()
    Thread(target=_leave_early, args=(channel, is_open), name="krasis-early", daemon=True).start()
    try:
        core = _opened(order)
    finally:
        is_open.set()
    with core as opened:
        opened.core.start()
        return EngineHost(opened.core, opened.slots, channel, _Recipes(opened)).serve()


def _leave_early(channel: Channel, is_open: Event) -> None:
    """Ends the process if the server ends before the model is open, which may take minutes."""
    channel.wait_until_left()
    if not is_open.is_set():
        os._exit(1)


def _opened(order: EngineOrder) -> OpenedCore:
    from krasis.runtime.server.ranks import backend_opener
    from krasis.runtime.serving.opening import open_core

    opened = open_core(
        order.bundle,
        order.engine,
        order.core,
        prefix_dir=order.prefix_dir,
        prefix_dir_bytes=order.prefix_dir_bytes,
        slot_dir=order.slot_dir,
        make_backend=backend_opener(order.engine, order.gpus),
    )
    text = opened.text
    # All that a request needs of it, so that none waits for the bundle's files. Encoding anything makes it
    # learn how its tokens are spelled; then decoding asks no worker.
    try:
        _ = (text.template, text.named_ends, text.end_tokens, text.defaults, text.markers)
        text.tokenizer.encode(".")
    except BaseException:
        opened.close(save_prefixes=False)
        raise
    return opened


class _Recipes:
    """Makes recipes of masks; the grammar's tokenizer is read when the first is used."""

    def __init__(self, opened: OpenedCore) -> None:
        from krasis.runtime.server.grammar import Grammars
        from krasis.runtime.text.assets import TOKENIZER

        self._text = opened.text
        data = opened.bundle.asset(TOKENIZER)
        self._grammars = Grammars(
            lambda: data, opened.core.vocab_size, lambda: sorted(opened.text.end_tokens.ids)
        )

    def __call__(self, grammar: Grammar, closes: tuple[str, ...]) -> MaskRecipe:
        from krasis.runtime.server.grammar import MaskRecipe

        self._grammars.prepare(grammar)  # here, where nobody waits for the next token
        return MaskRecipe(grammar, closes, self._grammars, self._decode)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._text.tokenizer.decode(list(tokens), skip_special=False)


def _configure_logging(level: int) -> None:
    from krasis.formats.process.log_lines import PrintableFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
    # The server reads the same text files, and has said what is odd about them.
    logging.getLogger("krasis.runtime.text").setLevel(max(level, logging.ERROR))
