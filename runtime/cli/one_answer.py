"""One prompt, one answer: printed, saved, reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from krasis.formats.errors import UsageError
from krasis.formats.process.standard_streams import OutputError
from krasis.formats.process.stop_signals import INTERRUPTED, deferred
from krasis.runtime.cli.conversation import Conversation
from krasis.runtime.cli.output import PrefillBar, note, stream_answer, write_text
from krasis.runtime.cli.report import json_report, memory_note, summary_line
from krasis.runtime.cli.text_options import think_switch
from krasis.runtime.cli.thinking_view import unfinished_note, write_whole
from krasis.runtime.engine import Engine
from krasis.runtime.generation import Generation
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.text.chat import Message

logger = logging.getLogger(__name__)


def answer_once(engine: Engine, text: str, sampling: SamplingSettings, options: dict[str, Any]) -> int:
    """Answers text as the options of ``krasis-run`` say; gives the exit code."""
    if options["raw"] and options["system"]:
        raise UsageError("--system needs the chat template", hint="leave out --raw or --system")
    system = [Message("system", options["system"])] if options["system"] else []
    prompt = text if options["raw"] else [*system, Message("user", text)]
    streaming = not (options["as_json"] or options["no_stream"])
    variables = think_switch(engine, options)
    if options["load_kv"] is not None:
        engine.load_prefix(options["load_kv"])
    with PrefillBar(engine) as bar:
        answer = engine.generate(
            prompt,
            sampling,
            max_tokens=options["max_tokens"],
            stop=options["stop"],
            progress=bar.update,
            template_vars=variables or None,
        )
        lost: OutputError | None = None
        try:
            stats = stream_answer(answer, bar, show=streaming, show_thinking=options["show_thinking"])
            if options["as_json"]:
                report = json_report(engine, stats, sampling, options["max_tokens"])
                report["settings"]["template_vars"] = {**engine.settings.template_vars, **variables}
                write_text(json.dumps(report) + "\n")
            elif not streaming:
                write_whole(stats, options["show_thinking"])
        except OutputError as error:
            stats, lost = answer.stats, error  # what was computed is saved before it is told
    _tell_end(engine, stats)
    if options["save_kv"] is not None:
        conversation = Conversation(engine, sampling, options["max_tokens"], options["system"])
        if not options["raw"]:
            conversation.turns = [Message("user", text), Message("assistant", stats.text)]
        save_tokens(engine, options["save_kv"], conversation)
    if lost is not None:
        raise lost
    note(summary_line(stats, engine))
    if advice := memory_note(engine):
        logger.info(advice)
    return INTERRUPTED if stats.stop_reason == "interrupted" else 0


def save_tokens(engine: Engine, path: Path, conversation: Conversation) -> None:
    """Writes the tokens held, and a conversation that has turns, for ``--load-kv``."""
    if not engine.tokens:
        note(f"nothing was computed: {path} is not written")
        return
    with deferred():
        engine.save_prefix(path, conversation=conversation.to_json() if conversation.turns else b"")
    note(f"saved {len(engine.tokens)} tokens to {path}")


def _tell_end(engine: Engine, stats: Generation) -> None:
    if advice := unfinished_note(stats):
        note(advice)
    if stats.stop_reason == "context":
        note(f"the context of {engine.context} tokens is full: a larger --ctx makes longer answers possible")
