"""A core for a bundle, with all that must live as long as it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.backend import Backend
from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.host.prefault import files_of_tiers, start_prefault
from krasis.runtime.open_backend import open_backend
from krasis.runtime.serving.api import Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import BatchBackend, CoreSettings, ModelSide
from krasis.runtime.serving.prefix_folder import PrefixFolder
from krasis.runtime.serving.slot_actions import SlotActions
from krasis.runtime.settings import EngineSettings
from krasis.runtime.text.assets import TextAssets
from krasis.runtime.text.ends import TextEnds, ends_of_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedCore:
    """core: not started. text: the bundle's text side, for rendering and tokenizing. slots: what an operator
    may do with the core's. Close it, or use
    ``with``."""

    core: EngineCore
    bundle: Bundle
    text: TextAssets
    slots: SlotActions
    _resources: ExitStack

    def close(self, save_prefixes: bool = True) -> None:
        """Closes the core (see ``api.Core``), and then what it stood on."""
        try:
            self.core.close(save_prefixes)
        finally:
            self._resources.close()

    def __enter__(self) -> OpenedCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_core(
    path: str | Path,
    engine: EngineSettings | None = None,
    settings: CoreSettings | None = None,
    *,
    prefix_dir: Path | None = None,
    prefix_dir_bytes: int = 2**40,
    slot_dir: Path | None = None,
    make_backend: Callable[[Bundle, EngineSettings], Backend] | None = None,
) -> OpenedCore:
    """Opens a bundle for many requests. engine: its slots are set by settings. prefix_dir: see ``make_core``.
    slot_dir: an existing folder for slots that an operator saves. make_backend: None = ``open_backend``.

    Raises what ``Engine.open`` raises, and ResourceError if the slots or prefix_dir cannot be had.
    """
    settings = settings or CoreSettings()
    engine = replace(engine or EngineSettings(), slots=settings.num_slots)
    begin = time.perf_counter()
    with ExitStack() as undo:
        bundle = undo.enter_context(open_bundle(Path(path), engine))
        text = TextAssets(bundle, engine.chat_template)
        text.prepare()
        tiers = ("dense", engine.experts)
        if engine.reread:
            bundle.drop_cached(files_of_tiers(bundle, tiers))
        backend = (make_backend or open_backend)(bundle, engine)
        undo.callback(backend.close)
        core = make_core(
            bundle, backend, text, settings, prefix_dir=prefix_dir, prefix_dir_bytes=prefix_dir_bytes
        )
        prefault = start_prefault(bundle, tiers, backend) if engine.prefault else None
        if prefault is not None:
            undo.callback(prefault.stop)
        opened = OpenedCore(core, bundle, text, core.slot_actions(bundle, slot_dir), undo.pop_all())
    logger.info("opened %s in %.3f s: %s", path, time.perf_counter() - begin, backend.description)
    return opened


def make_core(
    bundle: Bundle,
    backend: BatchBackend,
    text: TextAssets,
    settings: CoreSettings | None = None,
    *,
    prefix_dir: Path | None = None,
    prefix_dir_bytes: int = 2**40,
) -> EngineCore:
    """A core over a backend that is open. prefix_dir: prefixes are read from there, and saved there at the
    end (at most prefix_dir_bytes); None: they live in RAM alone. Raises ResourceError if it cannot be used.
    """

    def ends(request: Request) -> TextEnds:
        return ends_of_text(
            text,
            request.prompt,
            request.stops,
            is_plain=request.is_plain,
            split=request.split_thinking,
        )

    folder = None if prefix_dir is None else PrefixFolder(prefix_dir, bundle, backend, prefix_dir_bytes)
    model = ModelSide(bundle.spec.vocab, len(bundle.spec.layers), ends)
    return EngineCore(backend, model, settings, folder)
