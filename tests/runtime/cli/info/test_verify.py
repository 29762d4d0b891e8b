"""``--verify`` finds a flipped bit wherever it is, and says so in one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from krasis.runtime.cli.info_command import main


def verify(bundle: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(bundle), "--verify", *options])


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def place_of(bundle: Path, blob: str) -> tuple[Path, int, int]:
    """(file, first byte, last byte) from the manifest's JSON, not through our reader."""
    record = next(
        item for item in json.loads((bundle / "manifest.json").read_bytes())["blobs"] if item["name"] == blob
    )
    first = record["offset_bytes"]
    return bundle / record["file"], first, first + record["num_bytes"] - 1


def test_an_intact_bundle(pristine: Path):
    result = verify(pristine)
    assert result.exit_code == 0, result.output
    assert ": intact, " in result.output
    assert "GB/s" in result.output


def test_every_byte_is_counted(pristine: Path):
    record = json.loads(verify(pristine, "--json").stdout)["verify"]
    assert record["intact"] is True
    manifest = json.loads((pristine / "manifest.json").read_bytes())
    shards = sum(file["num_bytes"] - file["header_bytes"] for file in manifest["files"])
    assert record["num_bytes"] == shards + sum(asset["num_bytes"] for asset in manifest["assets"])


@pytest.mark.parametrize(
    "blob",
    ["embedding", "layers.0.attention.qkv", "lm_head.scale", "layers.0.experts.gpu", "layers.1.experts.cpu"],
)
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_flipped_bit_in_a_blob(bundle: Path, blob: str, end: str):
    file, first, last = place_of(bundle, blob)
    flip(file, first if end == "first" else last, bit=7)
    result = verify(bundle)
    assert result.exit_code == 3
    lines = result.output.splitlines()
    assert len(lines) == 2
    assert "DAMAGED, 1 problem" in lines[0]
    assert file.name in lines[1]
    assert blob in lines[1]


def test_a_flipped_bit_in_padding(bundle: Path):
    file, _, last = place_of(bundle, "layers.0.experts.cpu")
    flip(file, last + 1)
    result = verify(bundle)
    assert result.exit_code == 3
    assert "padding" in result.output


@pytest.mark.parametrize("name", ["dense-000.safetensors", "gpu-000.safetensors", "cpu-000.safetensors"])
@pytest.mark.parametrize("offset", [0, 20, 4090])
def test_a_flipped_bit_in_a_header(bundle: Path, name: str, offset: int):
    flip(bundle / name, offset)
    result = verify(bundle)
    assert result.exit_code == 3
    assert name in result.output


@pytest.mark.parametrize("offset", [0, 5, 30])
def test_a_flipped_bit_in_the_asset(bundle: Path, offset: int):
    flip(bundle / "tokenizer.json.zst", offset)
    result = verify(bundle)
    assert result.exit_code == 3
    assert "tokenizer.json" in result.output


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8, 0.9999])
@pytest.mark.parametrize("bit", [0, 5])
def test_a_flipped_bit_in_the_manifest(bundle: Path, share: float, bit: int):
    manifest = bundle / "manifest.json"
    flip(manifest, int(share * manifest.stat().st_size), bit)
    result = verify(bundle)
    assert result.exit_code == 3
    assert "manifest.json" in result.output


def test_several_problems_are_a_line_each(bundle: Path):
    for blob in ("layers.0.experts.gpu", "layers.1.experts.gpu", "final_norm"):
        file, first, _ = place_of(bundle, blob)
        flip(file, first + 5)
    (bundle / "stranger.txt").write_text("hello")
    result = verify(bundle, "--json")
    assert result.exit_code == 3
    record = json.loads(result.stdout)["verify"]
    assert record["intact"] is False
    assert len(record["problems"]) == 4
    assert "bundle" not in json.loads(result.stdout)


def test_a_missing_and_a_short_shard(bundle: Path):
    shard = bundle / "gpu-000.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    assert verify(bundle).exit_code == 3
    shard.unlink()
    result = verify(bundle)
    assert result.exit_code == 3
    assert "gpu-000.safetensors" in result.output


def test_verify_leaves_the_bundle_alone(bundle: Path):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in bundle.iterdir()}
    assert verify(bundle).exit_code == 0
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in bundle.iterdir()} == before
