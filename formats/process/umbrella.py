"""``krasis``: one name for all commands, ``krasis convert``, ``krasis run`` and so on."""

from __future__ import annotations

import sys
from importlib import import_module

from krasis.formats.process.standard_streams import prepare_streams
from krasis.formats.process.tool import tool_version

# By name, so that a command imports what it needs and nothing else: (module, what it does).
COMMANDS = {
    "convert": ("krasis.convert.cli", "pack a checkpoint into a bundle"),
    "run": ("krasis.runtime.cli.run", "chat with a bundle, or answer one prompt"),
    "serve": ("krasis.runtime.server.command", "an endpoint in OpenAI's and Anthropic's languages"),
    "info": (
        "krasis.runtime.cli.info_command",
        "what a bundle is and needs, and what a machine would do",
    ),
    "bench": ("krasis.runtime.cli.bench", "tokens a second of a bundle on this machine"),
}
USAGE = 2


def usage() -> str:
    """What ``krasis --help`` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}s}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: krasis COMMAND [OPTIONS] ...",
            "",
            "Runs very large mixture-of-experts models on one workstation.",
            "",
            "Commands:",
            *lines,
            "",
            "krasis COMMAND -h says more; krasis --version shows the version.",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that is named first. Leaves with its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    name = words[0] if words else "--help"
    if name in COMMANDS:
        command = import_module(COMMANDS[name][0]).main
        command(args=words[1:], prog_name=f"krasis {name}")
        return
    prepare_streams()
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"krasis, version {tool_version()}")
    else:
        print(f"krasis: no such command: {name[:80]!a}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
