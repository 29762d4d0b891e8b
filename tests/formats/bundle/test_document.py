"""A reader written from docs/FORMAT.md alone: it uses nothing of krasis, and must agree with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from format_builders import ASSETS, SPECS, blob_data

from krasis.formats.layouts import layout_from_id

HIDDEN, INNER = 128, 64


def test_manifest_offsets_and_assets(bundle):
    raw = (bundle / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    assert (json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode() == raw
    checksum = manifest.pop("checksum")
    body = json.dumps(manifest, sort_keys=True, indent=1) + "\n"
    assert xxhash.xxh3_128(body.encode(), seed=0).hexdigest() == checksum
    for entry in manifest["files"]:
        data = (bundle / entry["name"]).read_bytes()
        assert len(data) == entry["num_bytes"]
        assert int.from_bytes(data[:8], "little") + 8 == entry["header_bytes"]
        assert xxhash.xxh3_128_hexdigest(data[: entry["header_bytes"]]) == entry["header_xxh3_128"]
    specs = {spec.name: spec for spec in SPECS}
    for blob in manifest["blobs"]:
        data = (bundle / blob["file"]).read_bytes()[blob["offset_bytes"] :][: blob["num_bytes"]]
        assert data == blob_data(specs.pop(blob["name"])).tobytes()
        assert xxhash.xxh3_128_hexdigest(data) == blob["xxh3_128"]
        assert blob["offset_bytes"] % (4096 if blob["tier"] == "dense" else 2 << 20) == 0
    assert not specs
    for asset in manifest["assets"]:
        packed = (bundle / asset["file"]).read_bytes()
        assert xxhash.xxh3_128_hexdigest(packed) == asset["xxh3_128"]
        text = zstandard.decompress(packed)
        assert len(text) == asset["decompressed_bytes"]
        assert text == ASSETS[asset["name"]]


def rows(name, n, k):
    """The two blobs of "rows [n, k]"."""
    padded = aligned(n, 32)
    return [(name, "I8", (padded // 32, k // 4, 32, 4)), (f"{name}.scale", "F32", (padded,))]


def attention_blobs(mixer, hidden):
    d = mixer["head_dim"]
    a, kv = mixer["heads"] * d, mixer["kv_heads"] * d
    found = rows("attention.qkv", a + 2 * kv, hidden) + rows("attention.output", hidden, a)
    if mixer.get("bias"):
        found.append(("attention.qkv.bias", "F32", (a + 2 * kv,)))
    norms = {"head": (d, d), "flat": (a, kv), "none": ()}[mixer.get("qk_norm", "none")]
    found += [(f"attention.{x}_norm", "float", (n,)) for x, n in zip("qk", norms, strict=False)]
    return [*found, ("attention.norm", "float", (hidden,))]


def mlp_blobs(prefix, width, hidden):
    return rows(f"{prefix}.w13", 2 * width, hidden) + rows(f"{prefix}.w2", hidden, width)


def blobs_by_the_page(model):
    """Every dense blob with type and shape, from the JSON by sections 3 and 5."""
    hidden, vocab = model["hidden"], model["vocab"]
    found = [("embedding", "float", (vocab, hidden))]
    for i, number in enumerate(model["pattern"]):
        layer = model["layers"][number]
        mlp, own = layer["mlp"], attention_blobs(layer["mixer"], hidden)
        if mlp["kind"] == "mlp":
            own += [("mlp.norm", "float", (hidden,)), *mlp_blobs("mlp", mlp["intermediate"], hidden)]
        else:
            own += [("experts.norm", "float", (hidden,)), ("experts.router", "float", (mlp["count"], hidden))]
            if mlp["router"].get("correction_bias"):
                own.append(("experts.router.correction_bias", "F32", (mlp["count"],)))
            if "shared" in mlp:
                own += mlp_blobs("shared", mlp["shared"]["intermediate"], hidden)
            if mlp.get("shared_gate"):
                own.append(("shared.gate", "float", (1, hidden)))
        found += [(f"layers.{i}.{name}", dtype, shape) for name, dtype, shape in own]
    return [*found, ("final_norm", "float", (hidden,)), *rows("lm_head", vocab, hidden)]


@pytest.mark.parametrize(
    "name", ["qwen3-235b-a22b", "glm-4.5-air", "glm-4.6", "mixtral-8x7b", "olmoe-1b-7b", "qwen2-57b-a14b"]
)
def test_which_blobs_a_model_has(name):
    from krasis.formats.checkpoints.hf_config import read_hf_config
    from krasis.formats.models.tensors import blobs

    path = Path(__file__).parents[1] / "models" / "configs" / f"{name}.json"
    spec = read_hf_config(json.loads(path.read_text("utf-8")), name)
    ours = [(blob.name, blob.dtype or "float", blob.shape) for blob in blobs(spec)]
    assert ours == blobs_by_the_page(json.loads(json.dumps(spec.to_json())))


def test_the_page_names_every_field_of_a_bundles_models():
    """Those that a model of a convertible family can have."""
    text = (Path(__file__).parents[3] / "docs" / "FORMAT.md").read_text("utf-8")
    from krasis.formats.models import mlps, rope, spec

    for record in (spec.Norm, rope.Rope, rope.RopeScaling, mlps.GatedMlp, mlps.Router, mlps.Activation):
        missing = [name for name in record.__slots__ if f"`{name}`" not in text]
        assert set(missing) <= {"logit_cap", "by_token", "input_norm", "expert_scale"}, record


def aligned(size, alignment):
    return -(-size // alignment) * alignment


def read_tiles(raw, kind, n, k):
    weight = np.empty((n, k), np.float32)
    tile_bytes = TILE_BYTES[kind]
    halves = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for t in range(n // 32):
        for b in range(k // 32):
            tile = raw[(t * (k // 32) + b) * tile_bytes :][:tile_bytes]
            if kind == "mxfp4":
                scales = np.float32(2.0) ** (tile[-32:].astype(np.float32) - 127)
            else:
                scales = tile[-64:].view("<f2").astype(np.float32)
            for r in range(32):
                for c in range(32):
                    if kind == "q8":
                        code = int(tile.view(np.int8)[c // 4 * 128 + r * 4 + c % 4])
                    else:
                        byte = int(tile[c // 4 * 64 + r % 16 * 4 + c % 4])
                        code = byte >> 4 if r >= 16 else byte & 15
                        code = (halves + [-x for x in halves])[code] if kind == "mxfp4" else code - 8
                    weight[32 * t + r, 32 * b + c] = code * scales[r]
    return weight


TILE_BYTES = {"q8": 1088, "i4": 576, "mxfp4": 544}


@pytest.mark.parametrize("kind", TILE_BYTES)
def test_cpu_tiles(kind):
    tile_bytes = TILE_BYTES[kind]
    w13_bytes, w2_bytes = 2 * INNER * HIDDEN // 1024 * tile_bytes, HIDDEN * INNER // 1024 * tile_bytes
    start = aligned(w13_bytes, 64)
    record = np.random.default_rng(1).integers(0, 60, aligned(start + w2_bytes, 4096), dtype=np.uint8)
    w13 = read_tiles(record[:w13_bytes], kind, 2 * INNER, HIDDEN).reshape(INNER // 16, 2, 16, HIDDEN)
    gate, up = w13[:, 0].reshape(INNER, HIDDEN), w13[:, 1].reshape(INNER, HIDDEN)
    down = read_tiles(record[start:][:w2_bytes], kind, HIDDEN, INNER)
    layout = layout_from_id(f"cpu-{kind}-r32-b32")
    for ours, expected in zip(layout.unpack_expert(record, HIDDEN, INNER), (gate, up, down), strict=True):
        np.testing.assert_array_equal(ours, expected)


def read_marlin(words, stored, bits, k_size, n_size, group):
    """[K, N] float32 by the tables of section 6."""
    scales = np.empty_like(stored)
    for row, out in zip(stored, scales, strict=True):
        if group < k_size:
            for a, i, j in np.ndindex(n_size // 64, 8, 8):
                out[64 * a + i + 8 * j] = row[64 * a + 8 * i + j]
        else:
            for a, i, b, e in np.ndindex(n_size // 32, 4, 4, 2):
                out[32 * a + 8 * b + 2 * i + e] = row[32 * a + 8 * i + 2 * b + e]
    weight = np.empty((k_size, n_size), np.float32)
    for k, n in np.ndindex(k_size, n_size):
        r, c, j = k % 16, n % 16, n % 64 // 16
        lane = c % 8 * 4 + r % 8 // 2
        if bits == 4:
            column, f = n // 64 * 128 + lane * 4 + j, 2 * (c // 8) + r // 8 + 4 * (r % 2)
        else:
            column, f = n // 64 * 256 + lane * 8 + 2 * j + c // 8, r // 8 + 2 * (r % 2)
        u = int(words[k // 16, column]) >> (bits * f) & (2**bits - 1)
        weight[k, n] = (u - 2 ** (bits - 1)) * scales[k // group, n]
    return weight


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(4, 64, "bf16"), (4, 32, "f16"), (4, None, "bf16"), (8, 64, "f16")]
)
def test_marlin(bits, group, dtype):
    sizes = []
    for k, n in ((HIDDEN, 2 * INNER), (INNER, HIDDEN)):
        sizes += [k * n * bits // 8, k // (group or k) * n * 2]
    starts, end = [], 0
    for size in sizes:
        starts.append(aligned(end, 256))
        end = starts[-1] + size
    record = np.random.default_rng(2).integers(0, 60, aligned(end, 4096), dtype=np.uint8)
    parts = [record[start:][:size] for start, size in zip(starts, sizes, strict=True)]
    weights = []
    for index, (k, n) in enumerate(((HIDDEN, 2 * INNER), (INNER, HIDDEN))):
        raw = parts[2 * index + 1].view("<u2").reshape(-1, n)
        scales = (
            (raw.astype(np.uint32) << 16).view(np.float32)
            if dtype == "bf16"
            else raw.view("<f2").astype(np.float32)
        )
        words = parts[2 * index].view("<u4").reshape(k // 16, n * bits // 2)
        weights.append(read_marlin(words, scales, bits, k, n, group or k))
    expected = (weights[0][:, :INNER].T, weights[0][:, INNER:].T, weights[1].T)
    name = f"marlin-{'u4b8' if bits == 4 else 'u8b128'}-g{group or 'channel'}-{dtype}"
    for ours, theirs in zip(layout_from_id(name).unpack_expert(record, HIDDEN, INNER), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_marlin_check_values():
    from krasis.formats.layouts import marlin

    for (k, n), (column, field) in {
        (0, 0): (0, 0), (1, 0): (0, 4), (8, 0): (0, 1), (9, 0): (0, 5), (0, 8): (0, 2), (2, 0): (4, 0),
        (0, 1): (16, 0),
        (0, 16): (1, 0), (5, 37): (90, 4), (15, 63): (127, 7),
    }.items():  # fmt: skip
        codes = np.zeros((16, 64), np.uint8)
        codes[k, n] = 15
        words = marlin.pack_codes(codes, 4)
        assert words[0, column] == 15 << (4 * field)
        assert np.count_nonzero(words) == 1


def test_int8_rows():
    packed = np.random.default_rng(3).integers(-127, 128, (2, 8, 32, 4), dtype=np.int8)
    scales = np.random.default_rng(4).random(64, dtype=np.float32)
    expected = np.empty((64, 32), np.float32)
    for r, c in np.ndindex(64, 32):
        expected[r, c] = packed[r // 32, c // 4, r % 32, c % 4] * scales[r]
    np.testing.assert_array_equal(layout_from_id("int8-rows-r32k4").unpack(packed, scales), expected)
