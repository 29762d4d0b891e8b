"""Makes a service of a bundle: opens it, reads its text, and gives its core a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from krasis.runtime.server.service import ServeSettings, Service
from krasis.runtime.text.assets import TOKENIZER

if TYPE_CHECKING:
    from krasis.runtime.serving.opening import OpenedCore


def make_service(open_core: Callable[[], OpenedCore], settings: ServeSettings) -> tuple[Service, OpenedCore]:
    """The service, and what is to be closed after it. Raises KrasisError as ``Engine.open``: a model whose
    text cannot be read is told now and not to the first client.
    """
    opened = open_core()
    try:
        text = opened.text
        data = opened.bundle.asset(TOKENIZER) if text.tokenizer else b""
        # All that is read from the bundle's files, so that no request waits for it.
        _ = (text.template, text.named_ends, text.end_tokens, text.defaults, text.thinking_markers)
        text.note_sampling()
        settings = replace(settings, max_context=opened.bundle.spec.max_context)
        service = Service(opened.core, text, settings, lambda: data, opened.slots)
        opened.core.start()
    except BaseException:
        opened.close(save_prefixes=False)
        raise
    return service, opened
