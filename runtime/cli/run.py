"""``krasis-run``: chat with a bundle, or answer one prompt."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.process.command_line import StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.log_lines import PrintableFormatter
from krasis.formats.process.standard_streams import OutputError, check_stdout
from krasis.formats.process.starting import starting
from krasis.formats.process.stop_signals import deferred, ends_in_order, received
from krasis.runtime.cli.arguments import read_texts
from krasis.runtime.cli.text_options import (
    PENALTY_OPTIONS,
    given_variables,
    note_sampling,
    text_options,
    think_switch,
)

if TYPE_CHECKING:
    from krasis.runtime.cli.conversation import Conversation
    from krasis.runtime.engine import Engine
    from krasis.runtime.settings import EngineSettings, SamplingSettings

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", *PENALTY_OPTIONS)


class CommandError(click.ClickException):
    """A KrasisError on its way out: one line on stderr and the class's exit code."""

    def __init__(self, error: KrasisError) -> None:
        super().__init__(" ".join(str(error).split()))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click declares it a constant of the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the line."""
        click.echo(f"krasis-run: {self.message}", file=file or sys.stderr)


@click.command(
    cls=StreamsCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Answer TEXT and leave.")
@click.option(
    "--file",
    "prompt_file",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Answer the text of FILE (- is stdin) and leave.",
)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Use the chat template in FILE (Jinja) instead of the bundle's.",
)
@click.option("--stop", metavar="TEXT", multiple=True, help="End an answer at TEXT. May be repeated.")
@click.option(
    "--max-tokens",
    metavar="N",
    type=int,
    help="Longest answer. [default: until it ends or the context is full]",
)
@click.option(
    "--ctx",
    metavar="N",
    type=int,
    help="Tokens of context. [default: the model's maximum, or what memory has room for]",
)
@click.option(
    "--rope-scaling",
    metavar="SPEC",
    help="Stretch the context: yarn,FACTOR,ORIGINAL such as yarn,4,32768, or linear,FACTOR, or none.",
)
@click.option("--threads", metavar="N", type=int, default=0, help="CPU threads. [default: all]")
@click.option(
    "--isa",
    type=click.Choice(["auto", "avx2", "avx512_vnni", "amx_int8"]),
    default="auto",
    help="Instruction set.",
)
@click.option("--temperature", metavar="X", type=float, help="0 picks the most likely token.")
@click.option("--top-k", metavar="N", type=int, help="Draw from the N most likely tokens; 0 = all.")
@click.option("--top-p", metavar="X", type=float, help="Draw from the most likely tokens that make up X.")
@click.option(
    "--min-p", metavar="X", type=float, help="Drop tokens less likely than X times the most likely."
)
@click.option(
    "--repeat-penalty", "repetition_penalty", metavar="X", type=float, help="Above 1 discourages repetition."
)
@text_options
@click.option("--seed", metavar="N", type=int, help="Makes drawing repeatable.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["f16", "f32", "int8"]),
    default="f16",
    help="Precision of the KV cache (int8: half the memory; on the CPU alone).",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "float32"]),
    default="int8",
    help="float32 is a slow reference.",
)
@click.option(
    "--experts",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    help="Which copy of the experts the CPU runs; gpu needs --activations float32.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "double"]),
    metavar="[auto|cpu|cuda]",
    default="auto",
    help="cuda: prompts on the GPU, answers on both; auto: that if the machine can. [default: auto]",
)
@click.option("--gpus", metavar="N", type=click.IntRange(1), help="Share the work among N GPUs. [default: 1]")
@click.option(
    "--gpu-dtype",
    type=click.Choice(["bf16", "f16"]),
    default="bf16",
    help="Precision of the GPU's activations and KV cache.",
)
@click.option(
    "--vram",
    metavar="SIZE",
    help="Use at most so much of a GPU's memory, such as 14GiB. [default: what is free]",
)
@click.option(
    "--reread",
    is_flag=True,
    help="Take the weights from the disk anew: what cp left of them in memory is slower to read.",
)
@click.option(
    "--load-kv",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Go on from a saved prefix: what the prompt shares with it is not computed again.",
)
@click.option(
    "--save-kv",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Save all tokens and what was computed for them at the end.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: text, counts, timings, settings."
)
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option("--stats", is_flag=True, help="In a chat, tell the speed of every answer.")
@click.option(
    "--history/--no-history",
    default=True,
    help="Keep what is typed in a chat for the Up key of later ones. [default: on]",
)
@version_option()
@click.option("-v", "--verbose", count=True, help="Say what is chosen and why; -vv says more.")
@last_resort("krasis-run")
@ends_in_order("krasis-run")
def main(bundle: Path, prompt: str | None, prompt_file: Path | None, verbose: int, **options: Any) -> None:
    """Chat with the model in BUNDLE (a folder made by krasis-convert), or answer one prompt.

    A text piped to stdin, that of --file and that of --prompt make one prompt, in this order, a blank line
    between. Without any of them, at a terminal, a chat begins. Sampling follows what the model's files
    recommend where no option says otherwise; if they recommend nothing, the most likely token is taken, and a
    line says so.
    """
    _configure_logging(verbose)
    try:
        prompt, options = read_texts(prompt, options)
        # Of several ranks only the first reads what the user says, and writes.
        if not _is_worker():
            check_stdout()
            _start_worker()
        text = None if _is_worker() else _prompt_text(prompt, prompt_file)
        if text is None and (options["raw"] or options["as_json"]) and not _is_worker():
            raise UsageError(
                "--raw and --json answer one prompt", hint="give it by --prompt, --file or a pipe"
            )
        code = _run(bundle, text, options)
    except KrasisError as error:
        raise CommandError(error) from error
    except KeyboardInterrupt:  # while loading; a chat and an answer handle their own
        code = INTERRUPTED
    if code:
        raise click.exceptions.Exit(code)


def _run(bundle: Path, text: str | None, options: dict[str, Any]) -> int:
    """Opens the bundle and does what was asked; gives the exit code."""
    with starting():
        opened = _opened(bundle, options)
    if opened is None:  # a rank that has served its time
        return 0
    with opened as engine:
        _tell_idle_options(engine, options)
        sampling = _sampling(engine, options)
        note_sampling(engine, sampling, options)
        try:
            if text is None:
                return _chat(engine, sampling, options)
            return _answer_once(engine, text, sampling, options)
        finally:
            _tell_changes(engine)


def _start_worker() -> None:
    """The process that will read the bundle's text files gets ready while this one imports and maps."""
    from krasis.runtime.text.sandbox import shared_sandbox

    shared_sandbox().start()


def _opened(bundle: Path, options: dict[str, Any]) -> Engine | None:
    """The engine that the options ask for; None as of ``_open``."""
    from krasis.formats.files import mapping_guard
    from krasis.runtime.settings import EngineSettings

    if options["save_kv"] is not None and not _is_worker():
        from krasis.runtime.state.kv_file import check_target

        check_target(options["save_kv"], bundle)  # now, rather than after hours of chat
    settings = EngineSettings(
        context=options["ctx"],
        threads=options["threads"],
        isa=options["isa"],
        activations=options["activations"],
        experts=options["experts"],
        kv_dtype=options["kv_dtype"],
        device=options["device"],
        gpu_dtype=options["gpu_dtype"],
        vram_bytes=_vram_bytes(options["vram"]),
        reread=options["reread"],
        chat_template=None if options["chat_template"] is None else str(options["chat_template"]),
        template_vars=given_variables(options),
        rope_scaling=options["rope_scaling"],
    )
    mapping_guard.install("krasis-run")
    return _open(bundle, settings, options["gpus"])


def _vram_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    from krasis.formats.units import parse_bytes

    return parse_bytes(text, "--vram")


def _is_worker() -> bool:
    """Whether torchrun started this process as another rank than the first."""
    from krasis.runtime.distributed.launcher import is_worker_rank

    return is_worker_rank()


def _open(bundle: Path, settings: EngineSettings, num_gpus: int | None) -> Engine | None:
    """The engine; None on a rank that is not the first, once the first has ended."""
    from krasis.runtime.distributed.launcher import ignored_note, is_launched_rank

    if ignored := ignored_note():
        click.echo(f"note: {ignored}", err=True)
    if num_gpus is None and not is_launched_rank():
        from krasis.runtime.engine import Engine

        return Engine.open(bundle, settings)
    from krasis.runtime.distributed.launch import open_engine

    return open_engine(bundle, settings, num_gpus)


def _tell_idle_options(engine: Engine, options: dict[str, Any]) -> None:
    """A note if options for GPUs were given and none is used."""
    from krasis.runtime.host.visible_gpus import idle_options_note

    if not engine.description.startswith(("CPU", "NumPy")):
        return
    given = [flag for flag, name in (("--gpus", "gpus"), ("--vram", "vram")) if options[name] is not None]
    if idle := idle_options_note(given, options["device"]):
        click.echo(f"note: {idle}", err=True)


def _chat(engine: Engine, sampling: SamplingSettings, options: dict[str, Any]) -> int:
    from krasis.runtime.cli.conversation import Conversation
    from krasis.runtime.cli.output import note
    from krasis.runtime.cli.terminal import Terminal
    from krasis.runtime.text.chat import missing_template

    # Before the first prompt, so that nobody types in vain.
    if engine.text.tokenizer and engine.text.template is None:
        raise missing_template(str(engine.bundle.path))
    conversation = Conversation(engine, sampling, options["max_tokens"], None)
    conversation.template_vars = think_switch(engine, options)
    if options["load_kv"] is not None:
        conversation.load(options["load_kv"])
        note(f"{len(engine.tokens)} tokens and {len(conversation.turns)} messages restored")
    if options["system"]:
        conversation.system = options["system"]
    terminal = Terminal(
        conversation,
        options["stop"],
        options["show_thinking"],
        stats=options["stats"],
        remember=options["history"],
    )
    try:
        terminal.run()
    except KeyboardInterrupt:
        if received() is None:
            raise
    finally:  # whatever ended it: a terminal that is gone too, or answers that can no longer be written
        if options["save_kv"] is not None:
            _save(engine, options["save_kv"], conversation)
    return 0


def _answer_once(engine: Engine, text: str, sampling: SamplingSettings, options: dict[str, Any]) -> int:
    import json

    from krasis.runtime.cli.conversation import Conversation
    from krasis.runtime.cli.output import PrefillBar, note, stream_answer, write_text
    from krasis.runtime.cli.report import json_report, memory_note, summary_line
    from krasis.runtime.cli.thinking_view import unfinished_note, write_whole
    from krasis.runtime.text.chat import Message

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
    if advice := unfinished_note(stats):
        note(advice)
    if stats.stop_reason == "context":
        note(f"the context of {engine.context} tokens is full: a larger --ctx makes longer answers possible")
    if options["save_kv"] is not None:
        conversation = Conversation(engine, sampling, options["max_tokens"], options["system"])
        if not options["raw"]:
            conversation.turns = [Message("user", text), Message("assistant", stats.text)]
        _save(engine, options["save_kv"], conversation)
    if lost is not None:
        raise lost
    note(summary_line(stats, engine))
    if advice := memory_note(engine):
        logging.getLogger(__name__).info(advice)
    return INTERRUPTED if stats.stop_reason == "interrupted" else 0


def _save(engine: Engine, path: Path, conversation: Conversation) -> None:
    from krasis.runtime.cli.output import note

    if not engine.tokens:
        note(f"nothing was computed: {path} is not written")
        return
    with deferred():
        engine.save_prefix(path, conversation=conversation.to_json() if conversation.turns else b"")
    note(f"saved {len(engine.tokens)} tokens to {path}")


def _tell_changes(engine: Engine) -> None:
    from krasis.runtime.cli.output import note

    if changed := engine.bundle.changed_files():
        where = ", ".join(str(engine.bundle.path / name) for name in changed)
        note(
            f"{where}: written to while the model ran: what it said may be wrong. krasis-info --verify checks"
        )


def _sampling(engine: Engine, options: dict[str, Any]) -> SamplingSettings:
    given = {name: options[name] for name in SAMPLING_OPTIONS if options[name] is not None}
    return replace(engine.text.sampling, **given)


def _prompt_text(prompt: str | None, path: Path | None) -> str | None:
    """The one prompt to answer: a text piped in, then that of the file, then that of --prompt; None for a
    chat. Raises UsageError if there is none or one is unreadable.
    """
    from krasis.runtime.cli.piped_text import is_piped, join_prompt, read_piped
    from krasis.runtime.user_files import MAX_PROMPT_BYTES, read_stdin, read_user_file

    from_stdin = path is not None and str(path) == "-"
    alone = prompt is None and path is None
    if alone and sys.stdin is not None and sys.stdin.isatty():
        return None
    if sys.stdin is None and (alone or from_stdin):
        raise UsageError("there is no prompt: stdin is closed", hint="give it by --prompt or --file")
    pieces = []
    if alone or from_stdin or is_piped():
        pieces.append(_decode(read_piped(read_stdin, alone=alone or from_stdin), "stdin"))
    if path is not None and not from_stdin:
        pieces.append(_decode(read_user_file(path, "the prompt", MAX_PROMPT_BYTES), str(path)))
    text = join_prompt([*pieces, prompt or ""])
    if not text:
        what = "there is no prompt: stdin is empty" if alone else "the prompt is empty"
        raise UsageError(what, hint="give it by --prompt or --file" if alone else "")
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UsageError(
            "the prompt is not UTF-8 text", where=where, got=f"bad byte at {error.start}"
        ) from error


def _configure_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
