"""krasis-run's options about the text of answers: template variables, thinking, penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from krasis.formats.errors import UsageError

if TYPE_CHECKING:
    from krasis.runtime.engine import Engine
    from krasis.runtime.settings import SamplingSettings

_Command = TypeVar("_Command", bound=Callable[..., Any])

PENALTY_OPTIONS = ("presence_penalty", "frequency_penalty", "penalty_last_n")
_OPTIONS = (
    click.option(
        "--presence-penalty",
        metavar="X",
        type=float,
        help="Above 0 discourages what the answer said before.",
    ),
    click.option(
        "--frequency-penalty",
        metavar="X",
        type=float,
        help="Above 0 discourages what the answer said before, each time more.",
    ),
    click.option(
        "--repeat-last-n",
        "penalty_last_n",
        metavar="N",
        type=int,
        help="Penalties look at the last N tokens only; -1 = at all.",
    ),
    click.option(
        "--think/--no-think",
        "think",
        default=None,
        help="Have the model think before it answers, or not, if its template has such a switch.",
    ),
    click.option(
        "--template-var",
        "template_vars",
        metavar="NAME=VALUE",
        multiple=True,
        help="Tell the chat template a variable: JSON, or else text. May be repeated.",
    ),
    click.option(
        "--show-thinking/--hide-thinking",
        "show_thinking",
        default=None,
        help="Show what the model thinks: on a terminal before the answer, else on stderr."
        "  [default: shown on a terminal]",
    ),
)


def text_options(command: _Command) -> _Command:
    """Adds the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_variables(options: dict[str, Any]) -> dict[str, object]:
    """The values of ``--template-var``. Raises UsageError for what is no NAME=VALUE, or with ``--raw``."""
    from krasis.runtime.template_values import parse_assignment

    given = dict(parse_assignment(text) for text in options["template_vars"])
    if options["raw"] and (given or options["think"] is not None):
        raise UsageError(
            "--think and --template-var need the chat template", hint="leave out --raw or these options"
        )
    return given


def think_switch(engine: Engine, options: dict[str, Any]) -> dict[str, object]:
    """What ``--think`` and ``--no-think`` mean to the model's template; a note where it has no switch."""
    from krasis.runtime.cli.output import note
    from krasis.runtime.text.template_variables import names_offered, names_read, think_variables

    if options["think"] is None or engine.text.template is None:
        return {}
    source = engine.text.template.source
    variables = think_variables(options["think"], names_read(source))
    if not variables:
        flag = "--think" if options["think"] else "--no-think"
        offered = ", ".join(names_offered(source)) or "none"
        note(f"{flag} has no effect: the chat template has no switch for thinking (it offers: {offered})")
    return variables


def note_sampling(engine: Engine, sampling: SamplingSettings, options: dict[str, Any]) -> None:
    """Says what is sampled with where neither the model's files nor the user chose it."""
    from krasis.runtime.cli.output import note
    from krasis.runtime.generation_defaults import describe

    if not engine.text.defaults.recommended and options["temperature"] is None:
        note(
            f"the model's files recommend no sampling; tokens are picked so: {describe(sampling)} "
            "(--temperature 0.7 --top-p 0.95 draws them, which thinking models need)"
        )
