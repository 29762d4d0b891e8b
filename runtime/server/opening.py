"""Makes a service of a bundle: reads its text, while another process opens what computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.server.engine.life import EngineLife
from krasis.runtime.server.engine.order import EngineOrder
from krasis.runtime.server.engine.remote_core import RemoteCore
from krasis.runtime.server.service import ServeSettings, Service
from krasis.runtime.serving.api import Request
from krasis.runtime.settings import EngineSettings
from krasis.runtime.text.assets import TOKENIZER, TextAssets
from krasis.runtime.text.ends import ends_of_text


def make_service(order: EngineOrder, life: EngineLife, settings: ServeSettings) -> Service:
    """The service; its engine, which ``order`` describes, has been begun. Raises KrasisError as
    ``Engine.open``: a model whose text cannot be read is told now and not to the first client.
    """
    text, data, max_context = _read(order.bundle, order.engine)

    def check_text(request: Request) -> None:
        ends_of_text(text, request.prompt, request.stops, is_plain=request.is_plain, split=False)

    core = RemoteCore(life, max_waiting=order.core.max_waiting, folder=order.slot_dir, check_text=check_text)
    return Service(core, text, replace(settings, max_context=max_context), lambda: data, core)


def _read(path: Path, settings: EngineSettings) -> tuple[TextAssets, bytes, int]:
    """All that is read from the bundle's files, so that no request waits for it: no weight is among it."""
    with open_bundle(path, settings) as bundle:
        text = TextAssets(bundle, settings.chat_template)
        text.prepare()
        data = bundle.asset(TOKENIZER) if text.tokenizer else b""
        _ = (text.template, text.named_ends, text.end_tokens, text.defaults, text.markers)
        text.note_sampling()
        return text, data, bundle.spec.max_context
