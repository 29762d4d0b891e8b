"""The variables that a chat template reads and offers: enable_thinking and what else its author adds."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from krasis.formats.errors import FormatError
from krasis.formats.process.worker_protocol import unpack_parts
from krasis.runtime.template_values import RESERVED, TAKEN, THINK_SWITCHES
from krasis.runtime.text.sandbox import Resident, shared_sandbox

if TYPE_CHECKING:
    from jinja2 import nodes

logger = logging.getLogger(__name__)


def names_read(source: str) -> frozenset[str]:
    """All names that a template reads, its own among them. Empty for one that does not parse."""
    return _names(source)[0]


def names_offered(source: str) -> tuple[str, ...]:
    """The variables that a template lets its caller choose, sorted. Empty for one that does not parse."""
    return _names(source)[1]


@lru_cache(maxsize=8)
def _names(source: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Both, found by the worker: parsing a stranger's template may take seconds or exhaust the stack."""
    data = source.encode("utf-8", "surrogatepass")
    failure = "the names in the chat template cannot be found"
    try:
        answer = shared_sandbox().load(Resident("load_names", data, "chat template", failure))
        (read, offered), _ = unpack_parts(answer)
        return frozenset(map(str, read)), tuple(map(str, offered))
    except (FormatError, ValueError, TypeError) as error:
        logger.info("%s: %s", failure, error)
        return frozenset(), ()


def names_in(source: str) -> tuple[list[str], list[str]]:
    """What ``names_read`` and ``names_offered`` give, found here: it is for the worker."""
    return sorted(_names_read(source)), list(_names_offered(source))


def _names_read(source: str) -> frozenset[str]:
    from jinja2 import nodes

    tree = _parse(source)
    if tree is None:
        return frozenset()
    return frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")


def _names_offered(source: str) -> tuple[str, ...]:
    from jinja2 import nodes

    tree = _parse(source)
    if tree is None:
        return ()
    read: set[str] = set()
    bound: set[str] = set()
    tested: set[str] = set()
    for node in tree.find_all((nodes.Name, nodes.Macro, nodes.Test, nodes.Filter)):
        if isinstance(node, nodes.Name):
            (read if node.ctx == "load" else bound).add(node.name)
        elif isinstance(node, nodes.Macro):
            bound.add(node.name)
        elif isinstance(node, nodes.Test | nodes.Filter):
            tested |= _tested_name(node)
    for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tested -= _loop_names(loop)
    offered = ((read - bound) | (tested & read)) - RESERVED - TAKEN
    return tuple(sorted(name for name in offered if not name.startswith("krasis_")))


def _tested_name(node: nodes.Test | nodes.Filter) -> set[str]:
    """The name whose presence is asked for: ``x is defined``, ``x | default(1)``."""
    from jinja2 import nodes

    if node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name):
        return {node.node.name}
    return set()


def _loop_names(node: nodes.Node) -> set[str]:
    from jinja2 import nodes

    targets: Iterable[nodes.Node] = getattr(node, "args", [])
    if isinstance(node, nodes.For):
        targets = [node.target]
    found: set[str] = set()
    for target in targets:
        if isinstance(target, nodes.Name):
            found.add(target.name)
        found |= {name.name for name in target.find_all(nodes.Name)}
    return found


def _parse(source: str) -> nodes.Template | None:
    """The tree, parsed only: nothing of the template is evaluated."""
    from jinja2 import Environment, TemplateError
    from jinja2.ext import loopcontrols

    from krasis.runtime.text.template_sandbox import GenerationTag

    try:
        environment = Environment(autoescape=False, extensions=[GenerationTag, loopcontrols])  # noqa: S701
        return environment.parse(source)
    except (TemplateError, RecursionError, ValueError):
        return None


def think_variables(think: bool | None, names: frozenset[str]) -> dict[str, object]:
    """What ``--think`` and ``--no-think`` tell a template that reads such names; empty without a switch."""
    if think is None:
        return {}
    return {name: on if think else off for name, (on, off) in THINK_SWITCHES.items() if name in names}


def unused_note(given: tuple[str, ...], source: str) -> str:
    """A sentence that names the variables a template does not read; empty if there are none."""
    names = names_read(source)
    unused = [name for name in given if name not in names]
    if not unused:
        return ""
    offered = ", ".join(names_offered(source)) or "none"
    return f"the chat template does not use {', '.join(unused)} (it offers: {offered})"
