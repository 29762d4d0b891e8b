"""``krasis-serve``: a bundle as a server, for agents, editors and people."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.process.command_line import CommandError, StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.log_lines import PrintableFormatter

if TYPE_CHECKING:
    from krasis.runtime.server.engine.launch import EngineProcess
    from krasis.runtime.server.engine.life import EngineLife
    from krasis.runtime.server.engine.order import EngineOrder
    from krasis.runtime.server.service import ServeSettings, Service
    from krasis.runtime.settings import EngineSettings

PROGRAM = "krasis-serve"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEFAULT_CACHE_RAM = "4GiB"
DEFAULT_PREFIX_DIR_BYTES = "32GiB"
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")

_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "seed": "seed"}

logger = logging.getLogger(__name__)


@click.command(
    cls=StreamsCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Addresses to listen on.",
)
@click.option(
    "--port", metavar="N", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 = any."
)
@click.option("--alias", "aliases", metavar="NAME", multiple=True, help="The model's name. May be repeated.")
@click.option(
    "--api-key",
    "api_keys",
    metavar="KEY",
    multiple=True,
    envvar="KRASIS_API_KEY",
    help="Ask clients for this key. May be repeated. [env KRASIS_API_KEY]",
)
@click.option("--api-key-file", metavar="FILE", type=click.Path(path_type=Path), help="Keys, one a line.")
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Answers at a time.",
)
@click.option("--ctx", metavar="N", type=int, help="Tokens of one conversation. [default: as krasis-run]")
@click.option(
    "--queue",
    metavar="N",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Requests that may wait.",
)
@click.option(
    "--cache-ram",
    metavar="SIZE",
    default=DEFAULT_CACHE_RAM,
    show_default=True,
    help="RAM for earlier prompts; 0 = none.",
)
@click.option(
    "--prefix-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Keep earlier prompts there when the server ends.",
)
@click.option(
    "--prefix-dir-size",
    metavar="SIZE",
    default=DEFAULT_PREFIX_DIR_BYTES,
    show_default=True,
    help="Room in that folder.",
)
@click.option(
    "--cors-origins",
    metavar="LIST",
    default="",
    help="Web pages whose scripts may ask, separated by commas; * = all. [default: of this machine]",
)
@click.option("--strict", is_flag=True, help="Refuse requests that do not name a model.")
@click.option(
    "--ui", metavar="FOLDER", type=click.Path(path_type=Path), help="Serve this build of a web page at /."
)
@click.option("--no-ui", is_flag=True, help="Serve no web page.")
@click.option("--metrics/--no-metrics", default=True, help="Serve /metrics for Prometheus. [default: on]")
@click.option(
    "--slot-save-path",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Slots may be saved there, and restored from there, by POST /slots/N?action=save.",
)
@click.option("--slots/--no-slots", default=True, help="Serve /slots. [default: on]")
@click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(1, 3600),
    default=60.0,
    show_default=True,
    help="Seconds a request may take to arrive.",
)
@click.option(
    "--ping-interval",
    metavar="S",
    type=click.FloatRange(0.1, 250),
    default=10.0,
    show_default=True,
    help="Longest silence of a stream, in seconds.",
)
@click.option("--max-body", metavar="SIZE", default="32MiB", show_default=True, help="Longest request.")
@click.option(
    "--chat-template", metavar="FILE", type=click.Path(path_type=Path), help="Use this chat template."
)
@click.option("--chat-template-kwargs", metavar="JSON", default="{}", help="Variables for the chat template.")
@click.option(
    "--reasoning-format",
    type=click.Choice(["auto", "deepseek", "none", "deepseek-legacy"]),
    default="auto",
    help="Where thoughts go in chat: apart (auto, deepseek), into the answer's text (none), or both.",
)
@click.option("--temp", type=click.FloatRange(0, 100), help="Temperature, where a request has none.")
@click.option("--top-k", type=click.IntRange(0), help="top_k, where a request has none; 0 = off.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="top_p, where a request has none.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="min_p, where a request has none.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Seed, where a request has none.")
@click.option("--rope-scaling", metavar="SPEC", help="Stretch the context, as krasis-run does.")
@click.option("--threads", metavar="N", type=int, default=0, help="CPU threads. [default: all]")
@click.option(
    "--kv-dtype",
    type=click.Choice(["f16", "f32", "int8"]),
    default="f16",
    help="Precision of the KV cache (int8: half the memory; else a GPU's has 16 bits).",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "double"]),
    metavar="[auto|cpu|cuda]",
    default="auto",
    help="As krasis-run.",
)
@click.option(
    "--draft",
    metavar="N",
    type=int,
    help="Guess N tokens ahead on the CPU, while one answer is made. [default: 1 where it pays]",
)
@click.option("--gpus", metavar="N", type=click.IntRange(1), help="Share the work among N GPUs. [default: 1]")
@click.option("--vram", metavar="SIZE", help="Use at most so much of a GPU's memory.")
@version_option()
@click.option("-v", "--verbose", count=True, help="Say what is chosen and why; -vv says more.")
@click.option("-q", "--quiet", is_flag=True, help="No line for each request.")
@last_resort(PROGRAM)
def main(bundle: Path, verbose: int, quiet: bool, **options: Any) -> None:
    """Serve the model in BUNDLE (a folder made by krasis-convert) to programs that speak OpenAI's chat,
    responses or completions, or Anthropic's messages.

    Only this machine can reach it unless --host says otherwise. SIGTERM and Ctrl-C end it in order.
    """
    _configure_logging(verbose, quiet)
    try:
        _serve(bundle, {**options, "is_verbose": verbose > 1})
    except KrasisError as error:
        raise CommandError(PROGRAM, error) from error


def _serve(bundle: Path, options: dict[str, Any]) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            "the server's packages are not installed",
            got=f"no {', '.join(missing)}",
            hint="pip install 'krasis-bundle[serve]'",
        )
    if not bundle.exists():
        raise UsageError("there is no such bundle", got=str(bundle))
    from krasis.runtime.distributed.launcher import is_worker_rank
    from krasis.runtime.server.engine.launch import EngineProcess
    from krasis.runtime.text.sandbox import shared_sandbox

    begin = time.perf_counter()
    if is_worker_rank():
        from krasis.runtime.server.ranks import follow_first

        order = _order(bundle, options)
        follow_first(bundle, replace(order.engine, slots=order.core.num_slots), options["gpus"])
        return
    shared_sandbox().start()  # it gets ready while this process imports
    first = EngineProcess()
    try:
        _live(_order(bundle, options), first, options, begin)
    finally:
        first.kill()


def _order(bundle: Path, options: dict[str, Any]) -> EngineOrder:
    """What the engine's process shall open."""
    from krasis.formats.units import parse_bytes
    from krasis.runtime.server.engine.order import EngineOrder
    from krasis.runtime.serving.model_side import CoreSettings

    order = EngineOrder(
        bundle=bundle,
        engine=_engine(options),
        core=CoreSettings(
            num_slots=options["parallel"],
            max_waiting=options["queue"],
            cache_bytes=_size(options["cache_ram"], "--cache-ram"),
        ),
        prefix_dir=options["prefix_dir"],
        prefix_dir_bytes=parse_bytes(options["prefix_dir_size"], "--prefix-dir-size"),
        slot_dir=options["slot_save_path"],
        gpus=options["gpus"],
        log_level=logging.getLogger().getEffectiveLevel(),
        program=PROGRAM,
    )
    for folder in (order.prefix_dir, order.slot_dir):
        _make_folder(folder)
    return order


def _live(order: EngineOrder, first: EngineProcess, options: dict[str, Any], begin: float) -> None:
    """Serves with one engine after the other, should the first be lost."""
    from krasis.runtime.distributed.launcher import ignored_note, is_launched_rank
    from krasis.runtime.server.engine.life import EngineLife
    from krasis.runtime.server.engine.restarts import Restarts

    settings = _settings(order.bundle, options)

    def start(context: int | None) -> EngineProcess:
        return first.open(order) if context is None else type(first)().open(order.in_context(context))

    if note := ignored_note():
        click.echo(f"note: {note}", err=True)
    # The ranks of a job that torchrun started end with their first one: it cannot come again.
    life = EngineLife(start, None if is_launched_rank() else Restarts())
    life.begin()
    try:
        _answer(order, life, settings, options, begin)
    finally:
        life.close(save_prefixes=False)


def _answer(
    order: EngineOrder, life: EngineLife, settings: ServeSettings, options: dict[str, Any], begin: float
) -> None:
    """Answers requests till a signal comes, or no engine is left."""
    from krasis.runtime.server.opening import make_service
    from krasis.runtime.server.page_files import PageFiles
    from krasis.runtime.server.running import listen_all, run

    hosts = [one.strip() for one in options["host"].split(",") if one.strip()]
    listeners = listen_all(hosts, options["port"])
    addresses = [one.getsockname() for one in listeners]
    for one in [] if settings.api_keys else set(hosts) - set(LOOPBACK):
        click.echo(f"{PROGRAM}: note: anybody who reaches {one} may ask; --api-key asks for a key", err=True)

    def on_ready(service: Service) -> None:
        _say_ready(addresses, service, time.perf_counter() - begin)

    page = None if settings.ui is None else PageFiles(settings.ui)
    run(
        listeners,
        lambda: make_service(order, life, settings),
        life.close,
        on_ready,
        page,
        life.wait,
        header_timeout_s=options["timeout"],
    )


def _make_folder(folder: Path | None) -> None:
    """What prompts held is nobody else's business."""
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError("the folder cannot be made", where=str(folder), got=error.strerror) from error


def _say_ready(addresses: list[Any], service: Service, seconds: float) -> None:
    hosts = [f"[{one[0]}]" if ":" in one[0] else one[0] for one in addresses]
    places = " and ".join(f"http://{host}:{addresses[0][1]}/v1" for host in hosts)
    click.echo(
        f"{PROGRAM}: {service.settings.aliases[0]} on {places}, {service.core.context} "
        f"tokens of context ({service.core.description}; {seconds:.2f} s)",
        err=True,
    )


def _settings(bundle: Path, options: dict[str, Any]) -> ServeSettings:
    from krasis.formats.strict_json import parse_json_object
    from krasis.formats.units import parse_bytes
    from krasis.runtime.server.api_keys import api_keys
    from krasis.runtime.server.service import ServeSettings
    from krasis.runtime.template_values import check_variables

    text = options["chat_template_kwargs"]
    variables = parse_json_object(text.encode("utf-8", "replace"), "--chat-template-kwargs", max_bytes=2**20)
    check_variables(variables)
    return ServeSettings(
        aliases=options["aliases"] or (bundle.name.removesuffix(".krasis") or "krasis",),
        api_keys=api_keys(options["api_keys"], options["api_key_file"]),
        cors_origins=tuple(one.strip() for one in options["cors_origins"].split(",") if one.strip()),
        max_body_bytes=parse_bytes(options["max_body"], "--max-body"),
        max_requests=4 * (options["queue"] + options["parallel"]),
        body_timeout_s=options["timeout"],
        ping_interval_s=options["ping_interval"],
        metrics=options["metrics"],
        is_strict=options["strict"],
        bundle=bundle.name,
        thought_form=options["reasoning_format"],
        slots=options["slots"],
        is_verbose=options["is_verbose"],
        ui=_page(options["ui"], options["no_ui"]),
        template_vars=variables,
        sampling={name: options[key] for name, key in _SAMPLING.items() if options[key] is not None},
    )


def _page(folder: Path | None, none: bool) -> Path | None:
    from krasis.runtime.server.page_files import OWN_PAGE, PageFiles

    if none and folder is not None:
        raise UsageError("--ui and --no-ui exclude each other", got=str(folder))
    chosen = None if none else folder or OWN_PAGE
    if chosen is not None:
        PageFiles(chosen)  # now, not when the model has been loaded
    return chosen


def _engine(options: dict[str, Any]) -> EngineSettings:
    from krasis.formats.units import parse_bytes
    from krasis.runtime.distributed.launcher import is_launched_rank
    from krasis.runtime.settings import EngineSettings

    if options["draft"] and (options["gpus"] is not None or is_launched_rank()):
        from krasis.runtime.draft_option import not_on_gpus

        raise not_on_gpus()
    return EngineSettings(
        context=options["ctx"],
        threads=options["threads"],
        kv_dtype=options["kv_dtype"],
        device=options["device"],
        vram_bytes=None if options["vram"] is None else parse_bytes(options["vram"], "--vram"),
        chat_template=None if options["chat_template"] is None else str(options["chat_template"]),
        rope_scaling=options["rope_scaling"],
        draft=options["draft"],
    )


def _size(text: str, where: str) -> int:
    from krasis.formats.units import parse_bytes

    return 0 if text.strip() == "0" else parse_bytes(text, where)


def _configure_logging(verbose: int, quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("krasis.runtime.server").setLevel(
        logging.WARNING if quiet else min(level, logging.INFO)
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
