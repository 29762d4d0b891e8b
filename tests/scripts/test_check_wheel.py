"""The audit of what is built sees what is wrong with it."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import check_wheel

METADATA = """Metadata-Version: 2.4
Name: krasis-bundle
Summary: x
License-Expression: Apache-2.0
Requires-Python: >=3.11
Keywords: llm
Classifier: Typing :: Typed

{text}
"""
GOOD = "krasis_bundle-0.1.0-py3-none-manylinux_2_34_x86_64.whl"


def make_wheel(
    path: Path, text: str = "See [it](https://example.org).", leave_out: str = "", extra: str = ""
) -> Path:
    scripts = "\n".join(f"{name} = krasis.x:main" for name in check_wheel.COMMANDS)
    files = dict.fromkeys((check_wheel.LIBRARY, *check_wheel.TYPED), "")
    files["krasis_bundle-0.1.0.dist-info/METADATA"] = METADATA.format(text=text)
    files["krasis_bundle-0.1.0.dist-info/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    if extra:
        files[extra] = ""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            if name != leave_out:
                wheel.writestr(name, content)
    return path


def test_a_good_wheel(tmp_path):
    assert list(check_wheel.wheel_problems(make_wheel(tmp_path / GOOD))) == []


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        (GOOD.replace("py3-none", "cp311-cp311"), {}, "every Python"),
        (GOOD.replace("manylinux_2_34", "linux"), {}, "not audited"),
        (GOOD, {"leave_out": check_wheel.LIBRARY}, "libkrasis_cpu.so is missing"),
        (GOOD, {"leave_out": "krasis/runtime/py.typed"}, "runtime/py.typed is missing"),
        (GOOD, {"extra": "tests/test_x.py"}, "tests does not belong"),
        (GOOD, {"text": "[docs](docs/USING.md)"}, "cannot follow the link docs/USING.md"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, name, fields, problem, capsys):
    assert check_wheel.main([str(make_wheel(tmp_path / name, **fields))]) == 1
    assert problem in capsys.readouterr().err


def test_a_source_distribution_without_its_model(tmp_path):
    path = tmp_path / "krasis_bundle-0.1.0.tar.gz"
    (tmp_path / "README.md").write_text("x")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "README.md", "krasis_bundle-0.1.0/README.md")
    problems = list(check_wheel.sdist_problems(path))
    assert any("tiny-qwen3-moe" in problem for problem in problems)
    assert not any("README" in problem for problem in problems)


def test_the_description_of_the_index_has_no_relative_link():
    text = (Path(__file__).parents[2] / "docs/PACKAGE.md").read_text()
    assert all(link.startswith("https://") for link in check_wheel._LINK.findall(text))
