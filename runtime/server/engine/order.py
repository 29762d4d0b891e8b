"""What an engine's process is told to open."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import EngineSettings

UNBOUNDED = 2**31 - 1  # who asks the engine's process has counted its queue


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOrder:
    """bundle: its folder. gpus: see ``ranks.backend_opener``. prefix_dir, prefix_dir_bytes, slot_dir: see
    ``opening.open_core``. log_level: of the process's log. program: whose name its sentences begin with.
    """

    bundle: Path
    engine: EngineSettings
    core: CoreSettings
    prefix_dir: Path | None = None
    prefix_dir_bytes: int = 2**40
    slot_dir: Path | None = None
    gpus: int | None = None
    log_level: int = 30
    program: str = "krasis-serve"

    def in_context(self, context: int) -> EngineOrder:
        """The same, with a context of so many tokens: what was promised to clients."""
        return replace(self, engine=replace(self.engine, context=context))

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return {
            **{name: getattr(self, name) for name in ("prefix_dir_bytes", "gpus", "log_level", "program")},
            **{name: _text(getattr(self, name)) for name in ("bundle", "prefix_dir", "slot_dir")},
            "engine": {**asdict(self.engine), "template_vars": dict(self.engine.template_vars)},
            "core": asdict(replace(self.core, max_waiting=UNBOUNDED)),
        }

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> EngineOrder:
        """The order that ``to_json`` wrote."""
        core, limits = said["core"], said["core"]["limits"]
        return cls(
            **{name: said[name] for name in ("prefix_dir_bytes", "gpus", "log_level", "program")},
            bundle=Path(said["bundle"]),
            prefix_dir=_path(said["prefix_dir"]),
            slot_dir=_path(said["slot_dir"]),
            engine=EngineSettings(**said["engine"]),
            core=CoreSettings(**{**core, "limits": None if limits is None else Limits(**limits)}),
        )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
