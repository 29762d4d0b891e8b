"""``/set`` for what the chat template is told and for what is shown of the thinking."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.errors import UsageError
from krasis.runtime.template_values import SWITCH_WORDS, THINK_SWITCHES, check_variables, parse_value
from krasis.runtime.text.template_variables import names_offered, names_read, think_variables

if TYPE_CHECKING:
    from krasis.runtime.cli.terminal import Terminal


TEXT_OPTIONS = ("think", "show_thinking", "variables of the chat template")


def set_text_option(terminal: Terminal, name: str, text: str) -> bool:
    """Sets ``think``, ``show_thinking`` or a variable of the chat template (``none`` unsets it); False if
    name is none of them. Raises UsageError for a bad value or a template without such a switch."""
    variables = terminal.conversation.template_vars
    template = terminal.conversation.engine.text.template
    source = "" if template is None else template.source
    if name == "show_thinking":
        terminal.show_thinking = None if text == "none" else _switch(name, text)
        return True
    if name == "think":
        found = think_variables(_switch(name, text), names_read(source)) if text != "none" else {}
        if not found and text != "none":
            offered = ", ".join(names_offered(source)) or "none"
            raise UsageError(
                "the chat template has no switch for thinking", limit=f"variables it offers: {offered}"
            )
        for switch in THINK_SWITCHES:
            variables.pop(switch, None)
        variables.update(found)
        return True
    if name not in names_offered(source):
        return False
    if not text:
        raise UsageError(f"{name} needs a value", hint=f"/set {name} none unsets it")
    if text == "none":
        variables.pop(name, None)
    else:
        found = {name: parse_value(text, name)}
        check_variables(found)
        variables.update(found)
    return True


def text_settings(terminal: Terminal) -> list[str]:
    """What ``/set`` shows of them: variables that are set, those that may be, and show_thinking."""
    conversation = terminal.conversation
    variables = {**conversation.engine.settings.template_vars, **conversation.template_vars}
    template = conversation.engine.text.template
    offered = [] if template is None else [n for n in names_offered(template.source) if n not in variables]
    shown = [f"{name} {_word(value)}" for name, value in variables.items()]
    if terminal.show_thinking is not None:
        shown.append(f"show_thinking {_word(terminal.show_thinking)}")
    return shown + [f"{name} (not set)" for name in offered]


def _switch(name: str, text: str) -> bool:
    if text.lower() not in SWITCH_WORDS:
        raise UsageError(f"{name} must be on or off", got=text)
    return SWITCH_WORDS[text.lower()]


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
