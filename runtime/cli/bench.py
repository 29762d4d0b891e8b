"""``krasis bench``: tokens a second of a bundle on this machine, measured."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from krasis.formats.errors import KrasisError
from krasis.formats.process.command_line import StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.formats.process.standard_streams import write_output
from krasis.formats.process.stop_signals import INTERRUPTED, ends_in_order

if TYPE_CHECKING:
    from krasis.runtime.engine import Engine

JSON_VERSION = 1
_WARM_UP_TOKENS = 4


@click.command(cls=StreamsCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Length of the prompt, of random tokens.",
)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens to decode behind it.",
)
@click.option("-r", "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Measurements.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: all]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@version_option()
@last_resort("krasis bench")
@ends_in_order("")
def main(bundle: Path, *, as_json: bool, **options: Any) -> None:
    """Measure how fast BUNDLE's prompts and answers are computed here."""
    try:
        record = measure(bundle, **options)
    except KrasisError as error:
        click.echo(f"krasis bench: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("krasis bench: stopped", err=True)
        sys.exit(INTERRUPTED)
    write_output(json.dumps(record, indent=1) + "\n" if as_json else _text(record))


def measure(
    path: Path, *, prompt_tokens: int, tokens: int, repeats: int, threads: int, device: str
) -> dict[str, Any]:
    """Opens the bundle and times it. Tokens a second of each repetition; before the first, everything that is
    read in the background is in memory. Raises KrasisError.
    """
    import numpy as np

    from krasis.runtime.engine import Engine
    from krasis.runtime.settings import EngineSettings

    settings: dict[str, Any] = {"context": prompt_tokens + tokens, "threads": threads, "device": device}
    begin = time.perf_counter()
    with Engine.open(path, EngineSettings(**settings)) as engine:
        open_s = time.perf_counter() - begin
        engine.wait_until_read()
        vocab = engine.bundle.spec.vocab
        ids = np.random.default_rng(0).integers(0, vocab, prompt_tokens + tokens).tolist()
        prompt, answer = ids[:prompt_tokens], ids[prompt_tokens:]
        _prefill(engine, prompt)
        _decode(engine, answer[:_WARM_UP_TOKENS])
        prefill, decode = [], []
        for _ in range(repeats):
            prefill.append(prompt_tokens / _seconds(lambda: _prefill(engine, prompt)))
            decode.append(tokens / _seconds(lambda: _decode(engine, answer)))
        return {
            "krasis_bench": JSON_VERSION,
            "bundle": str(path),
            "engine": engine.description,
            "open_s": open_s,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
        }


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _prefill(engine: Engine, prompt: list[int]) -> None:
    engine.reset()
    engine.prefill(prompt)


def _decode(engine: Engine, answer: list[int]) -> None:
    for token in answer:
        engine.decode(token)


def _text(record: dict[str, Any]) -> str:
    lines = [f"{record['bundle']}: {record['engine']}, opened in {record['open_s']:.2f} s"]
    for name, count in (("prefill", record["prompt_tokens"]), ("decode", record["tokens"])):
        rates = record[f"{name}_tokens_per_s"]
        middle = statistics.median(rates)
        lines.append(f"{name:7s}  {middle:8.1f} tok/s ({min(rates):.1f} to {max(rates):.1f}), {count} tokens")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
