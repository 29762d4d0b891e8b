"""krasis-run with a bundle whose text files are hostile: one line on stderr, and exit code 3."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
TITLE = "\x1b]0;owned\x07\x1b[31mEVIL"
NEST = "{% set a = ['x'] %}" + "{% set a = [a,a,a,a,a,a,a,a,a,a] %}" * 9


@pytest.fixture
def bundle(chat_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(chat_bundle, tmp_path / "hostile.krasis")


def put(bundle: Path, name: str, data: bytes) -> None:
    """Replaces or adds a text file, under true checksums."""
    packed = zstandard.ZstdCompressor().compress(data)
    (bundle / f"{name}.zst").write_bytes(packed)
    path = bundle / "manifest.json"
    record = json.loads(path.read_bytes())
    record.pop("checksum")
    entry = {
        "name": name,
        "file": f"{name}.zst",
        "num_bytes": len(packed),
        "decompressed_bytes": len(data),
        "xxh3_128": xxhash.xxh3_128_hexdigest(packed),
    }
    assets = [one for one in record["assets"] if one["name"] != name] + [entry]
    record["assets"] = sorted(assets, key=lambda one: one["name"])
    text = json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"
    record["checksum"] = xxhash.xxh3_128_hexdigest(text)
    path.write_bytes(json.dumps(record, sort_keys=True, indent=1).encode() + b"\n")


def tokenizer_of(bundle: Path) -> dict[str, Any]:
    return dict(
        json.loads(zstandard.ZstdDecompressor().decompress((bundle / "tokenizer.json.zst").read_bytes()))
    )


def refusal(bundle: Path, *options: str) -> str:
    done = subprocess.run(
        [*RUN, str(bundle), "--prompt", "def main(): the rain", "--max-tokens", "4", *options],
        capture_output=True,
        check=False,
        timeout=60,
    )
    told = done.stderr.decode("utf-8")
    assert done.returncode == 3, told
    assert done.stdout == b""
    assert told.count("\n") == 1, told
    assert told.startswith("krasis-run: ")
    assert told.removesuffix("\n").isprintable(), ascii(told)
    return told


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (NEST + "{{ a|tojson }}", "takes more than"),
        ("{{ ('a' * 10000).translate({97: 'a' * 16000000})|length }}", "of memory"),
        ("{{ raise_exception('%s') }}" % TITLE, "EVIL"),  # noqa: UP031  braces of the template's own
        ("{{ 1.5|round(1000000000, 'ceil') }}", "takes more than"),
    ],
)
def test_a_hostile_template(source: str, part: str, bundle: Path) -> None:
    put(bundle, "chat_template.jinja", source.encode())
    told = refusal(bundle)
    assert "chat template" in told
    assert part in told


def _replace(old: str | dict[str, str], new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old} if isinstance(old, str) else old, "content": new}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "chunk size"),
        (lambda t: t.update(normalizer=_replace("", "x")), "fails on this text"),
        (lambda t: t["model"].update(continuing_subword_prefix="##"), "cannot be read"),
        (lambda t: t["model"].update(merges=[[TITLE, "b"]]), "EVIL"),
        (
            lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [_replace("a", "aa")] * 40}),
            "fails on this text",
        ),
        (
            lambda t: t.update(
                decoder={"type": "Sequence", "decoders": [_replace({"Regex": "."}, "aa")] * 40}
            ),
            "fails on these tokens",
        ),
    ],
)
def test_a_hostile_tokenizer(change: Callable[[dict[str, Any]], None], part: str, bundle: Path) -> None:
    record = tokenizer_of(bundle)
    change(record)
    put(bundle, "tokenizer.json", json.dumps(record).encode())
    told = refusal(bundle, "--raw", "--temperature", "0")
    assert "tokenizer.json" in told
    assert part in told


def test_control_characters_of_a_config(bundle: Path) -> None:
    put(bundle, "generation_config.json", json.dumps({"do_sample": True, "temperature": TITLE}).encode())
    assert "\\x1b]0;owned" in refusal(bundle)
