"""Runs bundles. ``Engine`` is the whole library interface; ``krasis-run`` is a terminal around it.

>>> from krasis.runtime import Engine, SamplingSettings
>>> with Engine.open("model.krasis") as engine:  # doctest: +SKIP
...     for piece in engine.generate("import os\\n", SamplingSettings(temperature=0.7), max_tokens=64):
...         print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krasis.runtime.engine import Engine
    from krasis.runtime.generation import Answer, Generation, Piece
    from krasis.runtime.settings import EngineSettings, SamplingSettings
    from krasis.runtime.text.chat import ChatTemplate, Message

__all__ = [
    "Answer",
    "ChatTemplate",
    "Engine",
    "EngineSettings",
    "Generation",
    "Message",
    "Piece",
    "SamplingSettings",
]

_HOMES = {
    "Answer": "generation",
    "ChatTemplate": "text.chat",
    "Engine": "engine",
    "EngineSettings": "settings",
    "Generation": "generation",
    "Message": "text.chat",
    "Piece": "generation",
    "SamplingSettings": "settings",
}


def __getattr__(name: str) -> object:
    # Imported on first use: `krasis-run --help` and krasis-info should not pay for NumPy and the kernels.
    from importlib import import_module

    if name == "__version__":
        from krasis.formats.process.tool import tool_version

        return tool_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"krasis.runtime.{_HOMES[name]}"), name)
