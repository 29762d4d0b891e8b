"""Opens what is served: the bundle, its text, and a core that computes in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from krasis.runtime.serving.api import Core
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.settings import EngineSettings
from krasis.runtime.text.assets import TOKENIZER, TextAssets


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready. tokenizer_json: reads its tokenizer's file. max_context: the most the model
    allows. close: frees what the core does not own, after the core was closed."""

    core: Core
    assets: TextAssets
    tokenizer_json: Callable[[], bytes]
    max_context: int
    close: Callable[[], None]


def open_model(
    path: Path,
    engine: EngineSettings,
    settings: CoreSettings,
    prefix_dir: Path | None = None,
    prefix_dir_bytes: int = 0,
) -> Opened:
    """Opens a bundle; time does not depend on its size. Raises KrasisError as ``Engine.open``."""
    from krasis.runtime.bundle_opening import open_bundle
    from krasis.runtime.host.prefault import start_prefault
    from krasis.runtime.open_backend import open_backend
    from krasis.runtime.serving.opening import make_core

    with ExitStack() as undo:
        bundle = undo.enter_context(open_bundle(path, engine))
        assets = TextAssets(bundle, engine.chat_template)
        assets.prepare()
        backend = open_backend(bundle, engine)
        undo.callback(backend.close)
        tokenizer_json = bundle.asset(TOKENIZER) if assets.tokenizer else b""
        _ = (assets.template, assets.end_tokens, assets.defaults, assets.thinking_markers, assets.named_ends)
        core = make_core(
            bundle, backend, assets, settings, prefix_dir=prefix_dir, prefix_dir_bytes=prefix_dir_bytes
        )
        if engine.prefault:
            prefault = start_prefault(bundle, ("dense", engine.experts))
            if prefault is not None:
                undo.callback(prefault.stop)
        core.start()
        longest = bundle.architecture.max_context
        kept = undo.pop_all()
    return Opened(core, assets, lambda: tokenizer_json, longest, kept.close)
