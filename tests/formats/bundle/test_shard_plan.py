import json

import pytest
from format_builders import SPECS, manifest_of

from krasis.formats.bundle.shard_plan import BlobSpec, plan_shards
from krasis.formats.checkpoints.safetensors import parse_header
from krasis.formats.errors import FormatError
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB, PAGE_BYTES


def blob(name, num_bytes, tier="cpu"):
    return BlobSpec(name, tier, "U8", (num_bytes,), "plain")


def test_blobs_lie_aligned_and_end_to_end_with_their_fillers():
    plan = plan_shards(SPECS)
    assert [file.name for file in plan.files] == [
        f"{tier}-000.safetensors" for tier in ("dense", "gpu", "cpu")
    ]
    for file in plan.files:
        alignment = PAGE_BYTES if file.tier == "dense" else HUGE_PAGE_BYTES
        assert len(file.header) % alignment == 0
        assert file.num_bytes % alignment == 0
        spans = [(item.offset_bytes, item.spec.num_bytes) for item in file.blobs]
        assert all(offset % alignment == 0 for offset, _ in spans)
        spans += [(item.offset_bytes, item.num_bytes) for item in file.fillers]
        position = len(file.header)
        for offset, num_bytes in sorted(spans):
            assert offset == position
            position += num_bytes
        assert position == file.num_bytes


def test_headers_are_exactly_what_the_specification_says():
    (file,) = plan_shards([blob("b", 3 * MIB), BlobSpec("a", "cpu", "F16", (2, 5), "plain")]).files
    text = (
        '{"__metadata__":{"format":"krasis","tier":"cpu"},'
        '"b":{"dtype":"U8","shape":[3145728],"data_offsets":[0,3145728]},'
        '"_padding.0":{"dtype":"U8","shape":[1048576],"data_offsets":[3145728,4194304]},'
        '"a":{"dtype":"F16","shape":[2,5],"data_offsets":[4194304,4194324]},'
        '"_padding.1":{"dtype":"U8","shape":[2097132],"data_offsets":[4194324,6291456]}}'
    )
    assert file.header == (2 * MIB - 8).to_bytes(8, "little") + text.encode().ljust(2 * MIB - 8)
    parsed = parse_header(file.header, file.num_bytes, "x")
    assert parsed.tensors["a"].offset_bytes == 6 * MIB == file.blobs[1].offset_bytes


def test_shards_are_cut_at_the_limit_and_keep_the_order():
    blobs = [blob(f"layers.{i}", 5 * MIB) for i in range(7)]
    plan = plan_shards(blobs, shard_bytes=16 * MIB)
    assert [[item.spec.name for item in file.blobs] for file in plan.files] == [
        ["layers.0", "layers.1"], ["layers.2", "layers.3"], ["layers.4", "layers.5"], ["layers.6"],
    ]  # fmt: skip
    assert all(file.num_bytes <= 16 * MIB for file in plan.files)
    assert plan.total_bytes == sum(file.num_bytes for file in plan.files)
    assert [file.name for file in plan.files] == [f"cpu-{i:03d}.safetensors" for i in range(4)]


def test_a_blob_larger_than_a_shard_has_its_own():
    plan = plan_shards([blob("a", MIB), blob("b", 20 * MIB), blob("c", MIB)], shard_bytes=8 * MIB)
    assert [[item.spec.name for item in file.blobs] for file in plan.files] == [["a"], ["b"], ["c"]]


def test_the_real_model_fits_the_rules():
    """235B: 94 layers of 2.6 GB; ten thousand small dense blobs do not overflow a header."""
    experts = [
        BlobSpec(f"layers.{i}.experts.cpu", "cpu", "U8", (128, 20_054_016), "cpu-q8-r32-b32")
        for i in range(94)
    ]
    dense = [
        BlobSpec(f"layers.{i}.x.{j}", "dense", "F32", (4096,), "plain")
        for i in range(1000)
        for j in range(10)
    ]
    plan = plan_shards([*dense, *experts])
    assert all(file.num_bytes <= 32 << 30 for file in plan.files)
    for file in plan.files:
        parse_header(file.header, file.num_bytes, file.name)


def test_plans_are_deterministic():
    assert plan_shards(SPECS) == plan_shards(SPECS)


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        ([blob("a", 1), blob("a", 1)], "occurs twice"),
        ([blob("_padding.0", 1)], "reserved"),
        ([blob("__metadata__", 1)], "reserved"),
        ([blob("a", 0)], "empty"),
        ([blob("a", 1, tier="disk")], "unknown tier"),
        ([BlobSpec("a", "cpu", "I64", (1,), "plain")], "dtype"),
        ([BlobSpec("a", "cpu", "U8", (1 << 40, 1 << 40), "plain")], "overflow"),
        ([BlobSpec("a", "cpu", "U8", (1,), "Marlin 4")], "layout"),
        ([BlobSpec("a\0", "cpu", "U8", (1,), "plain")], "control"),
        ([BlobSpec("a", "cpu", "U8", (), "plain")], "dimensions"),
    ],
)
def test_blobs_that_cannot_be_written(specs, complaint):
    with pytest.raises(FormatError, match=complaint):
        plan_shards(specs)


def test_place_and_records():
    plan = plan_shards(SPECS)
    file, item = plan.place("layers.1.experts.cpu")
    assert (file.name, item.offset_bytes) == ("cpu-000.safetensors", 4 * MIB)
    with pytest.raises(FormatError, match="'nope'"):
        plan.place("nope")
    with pytest.raises(FormatError, match="was not written"):
        plan.blob_records({})
    record = json.loads(manifest_of(plan, {spec.name: "0" * 32 for spec in SPECS}, []).to_bytes())
    assert record["files"][2]["num_bytes"] == plan.files[2].num_bytes
