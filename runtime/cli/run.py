"""``krasis-run``: chat with a bundle, or answer one prompt."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.process.command_line import CommandError, StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.log_lines import PrintableFormatter
from krasis.formats.process.stages import stage
from krasis.formats.process.standard_streams import check_stdout
from krasis.formats.process.starting import starting
from krasis.formats.process.stop_signals import INTERRUPTED, ends_in_order, received
from krasis.runtime.cli.arguments import read_texts
from krasis.runtime.cli.text_options import (
    PENALTY_OPTIONS,
    given_variables,
    note_sampling,
    text_options,
    think_switch,
)

if TYPE_CHECKING:
    from krasis.runtime.engine import Engine
    from krasis.runtime.settings import EngineSettings, SamplingSettings

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", *PENALTY_OPTIONS)


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
    help="Precision of the KV cache (int8: half the memory; else a GPU's is of --gpu-dtype).",
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
    "--draft",
    metavar="N",
    type=int,
    help="Guess N tokens ahead of each pass with the bundle's layer for that. [default: 1 where it pays]",
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
            _wake_gpu(options["device"])
        text = None if _is_worker() else _prompt(prompt, prompt_file)
        if text is None and (options["raw"] or options["as_json"]) and not _is_worker():
            raise UsageError(
                "--raw and --json answer one prompt", hint="give it by --prompt, --file or a pipe"
            )
        code = _run(bundle, text, options)
    except KrasisError as error:
        raise CommandError("krasis-run", error) from error
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
    from krasis.runtime.cli.engine_notes import tell_changes, tell_idle_options
    from krasis.runtime.cli.one_answer import answer_once

    with opened as engine:
        tell_idle_options(engine, options)
        sampling = _sampling(engine, options)
        note_sampling(engine, sampling, options)
        try:
            if text is None:
                return _chat(engine, sampling, options)
            return answer_once(engine, text, sampling, options)
        finally:
            tell_changes(engine)


def _prompt(prompt: str | None, path: Path | None) -> str | None:
    from krasis.runtime.cli.prompt_text import prompt_text

    return prompt_text(prompt, path)


def _start_worker() -> None:
    """The process that will read the bundle's text files gets ready while this one imports and maps."""
    from krasis.runtime.text.sandbox import shared_sandbox

    shared_sandbox().start()


def _wake_gpu(device: str) -> None:
    """So does the driver, which takes seconds where nothing keeps the GPUs awake."""
    from krasis.runtime.host.visible_gpus import has_gpu

    if device in ("auto", "cuda") and has_gpu():
        from krasis.runtime.device.driver import wake

        wake()


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
        draft=options["draft"],
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
        with stage("import the engine"):
            from krasis.runtime.engine import Engine

        return Engine.open(bundle, settings)
    if settings.draft:
        from krasis.runtime.draft_option import not_on_gpus

        raise not_on_gpus()
    with stage("import the engine for several ranks"):
        from krasis.runtime.distributed.launch import open_engine

    return open_engine(bundle, settings, num_gpus)


def _chat(engine: Engine, sampling: SamplingSettings, options: dict[str, Any]) -> int:
    from krasis.runtime.cli.conversation import Conversation
    from krasis.runtime.cli.one_answer import save_tokens
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
            save_tokens(engine, options["save_kv"], conversation)
    return 0


def _sampling(engine: Engine, options: dict[str, Any]) -> SamplingSettings:
    given = {name: options[name] for name in SAMPLING_OPTIONS if options[name] is not None}
    return replace(engine.text.sampling, **given)


def _configure_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
