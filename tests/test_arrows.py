"""Who imports whom, read from the sources: between the folders of the three packages there is one direction.

A new folder or file at the top of ``runtime`` gets its place in ``LAYERS``. Arrows that only type checking or
one function needs count as well.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("formats", "convert", "runtime")

# runtime/, lowest first: each knows only what stands before it in this list; those of one line do not know
# each other. ``runtime`` itself is the library's face, its __init__.py.
LAYERS = (
    ("batch", "device", "early", "exclusive", "loading", "rope_option", "stops", "template_values"),
    ("backend", "drafting", "missing_kernels", "reference", "settings"),
    ("generation_defaults", "layer_progress", "sampler"),
    ("bundle_opening", "planning", "state", "text"),
    ("cpu", "draft_option", "generation", "user_files"),
    ("host", "importance", "wider_cache"),
    ("context_size", "host_memory"),
    ("gpu", "this_machine"),
    ("held_tokens", "open_backend"),
    ("serving",),
    ("engine",),
    ("runtime", "distributed"),
    ("server",),
    ("cli",),
)
# What krasis-convert may use of the runtime: the text side that will read its files, and what has no kernels.
OF_RUNTIME_FOR_CONVERT = {"runtime/text", "runtime/missing_kernels"}

Arrows = dict[tuple[str, str], list[str]]


def _folder(module: str) -> str:
    """``runtime/cpu`` of ``krasis.runtime.cpu.backend``: the second level, a folder or a file."""
    parts = module.split(".")[1:]
    return "convert" if parts[0] == "convert" else "/".join(parts[:2])


def _imports(tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield (whole if whole in modules else str(node.module)), node.lineno


@functools.cache
def _arrows() -> Arrows:
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(("krasis", *parts)).removesuffix(".__init__")] = path
    arrows: Arrows = {}
    for module, path in files.items():
        for target, line in _imports(ast.parse(path.read_text(encoding="utf-8")), set(files)):
            begin, end = _folder(module), _folder(target) if target.startswith("krasis.") else ""
            if end and begin != end:
                arrows.setdefault((begin, end), []).append(f"{path.relative_to(ROOT)}:{line}")
    return arrows


def _shown(wrong: Arrows) -> str:
    return "\n".join(f"{begin} -> {end}: {', '.join(where)}" for (begin, end), where in wrong.items())


def _of_runtime(name: str) -> str:
    return name if name == "runtime" else f"runtime/{name}"


def test_packages_point_one_way() -> None:
    arrows = _arrows()
    wrong = {}
    for begin, end in arrows:
        upward = begin.startswith("formats") and not end.startswith("formats")
        sideways = begin.startswith("runtime") and end == "convert"
        too_much = begin == "convert" and end.startswith("runtime") and end not in OF_RUNTIME_FOR_CONVERT
        if upward or sideways or too_much:
            wrong[begin, end] = arrows[begin, end]
    assert not wrong, _shown(wrong)


def test_no_circle_of_folders() -> None:
    graph: dict[str, set[str]] = {}
    for begin, end in _arrows():
        graph.setdefault(begin, set()).add(end)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        pytest.fail(_shown({pair: _arrows()[pair] for pair in pairwise(circle)}))
    print(f"\n{len(graph)} folders and files that import others, {len(_arrows())} arrows")


def test_layers_of_the_runtime() -> None:
    rank = {_of_runtime(name): index for index, layer in enumerate(LAYERS) for name in layer}
    inside = {pair: where for pair, where in _arrows().items() if all(x.startswith("runtime") for x in pair)}
    missing = {name for pair in inside for name in pair} - set(rank)
    assert not missing, f"give these their place in LAYERS: {sorted(missing)}"
    wrong = {(begin, end): where for (begin, end), where in inside.items() if rank[begin] <= rank[end]}
    assert not wrong, _shown(wrong)
    counts = Counter(begin for begin, _ in inside)
    print(f"\nruntime: {len(inside)} arrows; most from {counts.most_common(4)}")
