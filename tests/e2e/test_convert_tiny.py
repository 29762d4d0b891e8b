"""The trained tiny model through the installed command: as the README's first lines do it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.verify import verify_bundle

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/assets/tiny-qwen3-moe"
COMMAND = [sys.executable, "-c", "from krasis.convert.cli import main; main()"]

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the trained model is not in this checkout")


def convert(*arguments: object) -> dict:
    command = [*COMMAND, *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def q8(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf"
    command = [
        sys.executable,
        "-m",
        "scripts.models.make_tiny_model",
        "gguf",
        "--model",
        MODEL,
        "--out",
        path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def both(q8, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("bundle") / "tiny.krasis"
    return out, convert(MODEL, q8, "-o", out)


def test_quality_and_memory(both):
    out, summary = both
    assert verify_bundle(out) == []
    quality = {kind: row["relative_mse"] for kind, row in summary["quality"].items()}
    assert quality["experts.cpu.w13"] == quality["experts.cpu.w2"] == 0.0
    assert 0.005 < quality["experts.gpu.w13"] < 0.0105
    assert max(quality["attention.qkv"], quality["attention.output"], quality["lm_head"]) < 1e-4
    assert summary["peak_bytes"] < 400 << 20


def test_again_in_another_order_and_on_one_thread_gives_the_same_bytes(both, q8, tmp_path):
    out = tmp_path / "tiny.krasis"
    convert(q8, MODEL, "-o", out, "--threads", "1")
    assert digests(out) == digests(both[0])


def test_the_gguf_alone_carries_the_same_tokenizer(q8, tmp_path):
    from tokenizers import Tokenizer

    out = tmp_path / "tiny.krasis"
    convert(q8, "-o", out)
    text = (MODEL / "heldout.txt").read_text()[:20_000] + "<|im_start|>user\n\u00e9\u4e2d<|im_end|>\n"
    with Bundle.open(out) as bundle:
        rebuilt = Tokenizer.from_str(bundle.asset("tokenizer.json").decode())
        assert b"im_start" in bundle.asset("tokenizer_config.json")
    original = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = rebuilt.encode(text).ids
    assert ids == original.encode(text).ids
    assert rebuilt.decode(ids) == original.decode(ids)
