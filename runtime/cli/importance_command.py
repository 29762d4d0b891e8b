"""Collects importance weights for krasis-convert --calibration from a text, on the CPU.

Every token of the text passes the model in float32 arithmetic (NumPy). The text should be of the kind that
the model will see, and no part of a text that quality is measured by. A few hundred tokens an expert are
enough: some 50,000 tokens for 128 experts of which 8 are used.

    python -m krasis.runtime.cli.importance_command model.krasis --text calibration.txt -o calibration.h5
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from tqdm import tqdm

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.files import mapping_guard
from krasis.formats.process.command_line import StreamsCommand, version_option
from krasis.formats.process.last_resort import last_resort
from krasis.runtime.importance import Importance, collect
from krasis.runtime.settings import EXPERT_TIERS
from krasis.runtime.user_files import read_user_file

MAX_TEXT_BYTES = 1 << 30


@click.command(cls=StreamsCommand, help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8; may be repeated.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The HDF5 file to write."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Use the first tokens only.")
@click.option(
    "--context", default=2048, show_default=True, type=click.IntRange(2), help="Tokens that see each other."
)
@click.option("--experts", type=click.Choice(EXPERT_TIERS), help="Experts to run [default: cpu if there].")
@version_option()
@last_resort("importance")
def main(
    bundle: Path,
    texts: tuple[Path, ...],
    output: Path,
    max_tokens: int | None,
    context: int,
    experts: str | None,
) -> None:
    try:
        mapping_guard.install("importance")
        text = "\n\n".join(read_user_file(path, "the text", MAX_TEXT_BYTES).decode() for path in texts)
        with (
            Bundle.open(bundle) as opened,
            tqdm(total=len(opened.spec.layers), unit="layer", disable=not sys.stderr.isatty()) as bar,
        ):
            found = collect(
                opened,
                text,
                context=context,
                max_tokens=max_tokens,
                tier=experts,
                progress=bar.update,
            )
        found.save(output)
    except KrasisError as error:
        click.echo(f"importance: error: {error}", err=True)
        sys.exit(error.exit_code)
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"not UTF-8: {error}", param_hint="--text") from error
    click.echo(summary(found, output))


def summary(found: Importance, output: Path) -> str:
    """What was collected, in a sentence or two."""
    tokens = [int(layer.tokens.min()) for layer in found.layers.values()]
    text = (
        f"{output}: {found.provenance['num_tokens']} tokens; the least used expert saw {min(tokens)} of them"
    )
    if found.num_unreached:
        text += f"; {found.num_unreached} experts saw none and are packed without weights: give more text"
    return text + f"\nnext: krasis-convert ... --calibration {output}"


if __name__ == "__main__":
    main()
