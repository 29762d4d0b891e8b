"""Blobs that are not the architecture's, and codes that no packer writes, do not pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from format_builders import LAYOUTS, SPECS, blob_data, model, write_bundle

from krasis.formats.bundle.blob_names import blob_names, check_blob_names
from krasis.formats.bundle.code_ranges import CodeRange, code_range
from krasis.formats.bundle.manifest import FORMAT_MINOR, Manifest
from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.bundle.writer import BlobSpec, BundleWriter, plan_shards
from krasis.formats.errors import FormatError, VersionError
from krasis.formats.layouts import CpuTileLayout
from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.settings import EngineSettings


def write(final: Path, specs: list[BlobSpec], recipe: dict, change=lambda name, data: None) -> Path:
    """A bundle of those blobs, with true checksums; change gets each blob's bytes before they are written."""
    plan, digests = plan_shards(specs), {}
    with BundleWriter(final.with_name(final.name + ".partial"), plan) as writer:
        writer.create()
        for spec in specs:
            data = blob_data(spec)
            change(spec.name, data)
            with writer.open_blob(spec.name) as sink:
                sink.write(data)
                digests[spec.name] = sink.close()
        blobs = plan.blob_records(digests)
        manifest = Manifest("0.0.test", model(), LAYOUTS, plan.file_records(), blobs, (), (), recipe, {})
        writer.finish(manifest, final)
    return final


def test_a_converted_bundle_has_these_names(tmp_path: Path):
    bundle = write_bundle(tmp_path / "m")
    assert {spec.name for spec in SPECS} == set(blob_names(model(), LAYOUTS))
    open_bundle(bundle, EngineSettings()).close()
    assert not verify_bundle(bundle)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("layers.1.experts.cpu", "layers.2.experts.cpu", "lacks a blob"),
        ("layers.0.attention.norm", "layers.0.attention.Norm", "lacks a blob"),
        ("lm_head.scale", None, "lacks a blob"),
        (None, "layers.2.attention.norm", "no use for"),
        (None, "layers.0.attention.qkv.bias", "no use for"),
        (None, "layers.01.attention.norm", "no use for"),
    ],
)
def test_other_names_are_refused(old: str | None, new: str | None, what: str, tmp_path: Path):
    specs = [replace(one, name=new or "") if one.name == old else one for one in SPECS]
    specs = [one for one in specs if one.name]
    if old is None:
        specs.append(BlobSpec(str(new), "dense", "F32", (16,), "plain"))
    bundle = write(tmp_path / "m", specs, {})
    with pytest.raises(FormatError, match=what) as caught:
        open_bundle(bundle, EngineSettings())
    assert (old or new) in str(caught.value)
    (problem,) = verify_bundle(bundle)
    assert what in problem.what


def test_what_a_newer_format_adds_asks_for_an_upgrade(tmp_path: Path):
    with Bundle.open(
        write(tmp_path / "m", [*SPECS, BlobSpec("sink", "dense", "F32", (1,), "plain")], {})
    ) as bundle:
        newer = replace(bundle.manifest, format_minor=FORMAT_MINOR + 1)
    with pytest.raises(VersionError, match="upgrade"):
        check_blob_names(newer, "m")


RECORD = CpuTileLayout("q8").expert_record(64, 64)
TILES = BlobSpec("layers.0.experts.cpu", "cpu", "U8", (4, RECORD.record_bytes), "cpu-q8-r32-b32")
ROWS = BlobSpec("lm_head", "dense", "I8", (4, 16, 32, 4), "int8-rows-r32k4")


@pytest.mark.parametrize(
    ("name", "at", "recipe", "found"),
    [
        ("lm_head", 0, {}, True),
        ("lm_head", 4 * 16 * 32 * 4 - 1, {}, True),
        (TILES.name, 5, {}, True),
        (TILES.name, 3 * RECORD.record_bytes + RECORD.w2_codes.offset_bytes + 1088 + 1023, {}, True),
        (TILES.name, 1024 + 3, {}, False),  # a scale
        (TILES.name, 5, {"cpu_experts_from": "gguf: Q8_0"}, False),  # kept as they were
        ("lm_head", 7, {"cpu_experts_from": "gguf: Q8_0"}, True),
        (TILES.name, 5, {"cpu_experts_from": "hf: BF16"}, True),
    ],
)
def test_the_code_minus_128_is_found(name: str, at: int, recipe: dict, found: bool, tmp_path: Path):
    special = {one.name: one for one in (TILES, ROWS)}
    specs = [special.get(one.name, one) for one in SPECS]

    def change(blob: str, data: np.ndarray) -> None:
        if blob == name:
            data[at] = 128

    problems = verify_bundle(write(tmp_path / "m", specs, recipe, change))
    assert [(name in one.where, f"byte {at} is the code -128" in one.what) for one in problems] == (
        [(True, True)] if found else []
    )


def test_pieces_of_any_size_are_looked_at(tmp_path: Path):
    with Bundle.open(
        write(tmp_path / "m", [TILES if one.name == TILES.name else one for one in SPECS], {})
    ) as bundle:
        record = bundle.blob(TILES.name)
        data = bundle.map(TILES.name).reshape(-1).copy()
        looking = code_range(bundle.manifest, record)
    assert isinstance(looking, CodeRange)
    at = RECORD.record_bytes + 1088 * 3 + 77
    data[at] = 128
    for begin in range(0, len(data), 1000):
        looking.add(data[begin : begin + 1000].tobytes())
    assert looking.first == at
