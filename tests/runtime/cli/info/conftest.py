"""A tiny bundle, every tier and an asset in it, written by BundleWriter with random bytes for weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.architecture import Architecture, RopeScaling
from krasis.formats.bundle.manifest import Manifest, SourceRecord
from krasis.formats.bundle.writer import BlobSpec, BundleWriter, plan_shards
from krasis.formats.layouts import layout_from_id
from krasis.formats.models.uniform import spec_of

TINY = Architecture(
    model_type="qwen3_moe",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_token=2,
    expert_intermediate_size=64,
    vocab_size=96,
    max_positions=512,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=RopeScaling(),
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
LAYOUTS = {"dense": "int8-rows-r32k4", "gpu": "marlin-u4b8-g32-bf16", "cpu": "cpu-q8-r32-b32"}

# The least that the tokenizers library reads, of a size that the tests know.
TOKENIZER = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}'.ljust(
    850
)


def blob_specs() -> list[BlobSpec]:
    blobs = [BlobSpec("embedding", "dense", "BF16", (96, 64), "plain")]
    for layer in range(2):
        at = f"layers.{layer}"
        blobs += [
            BlobSpec(f"{at}.attention.qkv", "dense", "I8", (4, 16, 32, 4), LAYOUTS["dense"]),
            BlobSpec(f"{at}.attention.qkv.scale", "dense", "F32", (128,), "plain"),
            BlobSpec(f"{at}.attention.output", "dense", "I8", (2, 16, 32, 4), LAYOUTS["dense"]),
            BlobSpec(f"{at}.attention.output.scale", "dense", "F32", (64,), "plain"),
            BlobSpec(f"{at}.attention.q_norm", "dense", "BF16", (16,), "plain"),
            BlobSpec(f"{at}.attention.k_norm", "dense", "BF16", (16,), "plain"),
            BlobSpec(f"{at}.attention.norm", "dense", "BF16", (64,), "plain"),
            BlobSpec(f"{at}.experts.norm", "dense", "BF16", (64,), "plain"),
            BlobSpec(f"{at}.experts.router", "dense", "BF16", (4, 64), "plain"),
        ]
        for tier in ("gpu", "cpu"):
            record = layout_from_id(LAYOUTS[tier]).expert_record(64, 64).record_bytes
            blobs.append(BlobSpec(f"{at}.experts.{tier}", tier, "U8", (4, record), LAYOUTS[tier]))
    return [
        *blobs,
        BlobSpec("final_norm", "dense", "BF16", (64,), "plain"),
        BlobSpec("lm_head", "dense", "I8", (3, 16, 32, 4), LAYOUTS["dense"]),
        BlobSpec("lm_head.scale", "dense", "F32", (96,), "plain"),
    ]


def write_bundle(final: Path) -> None:
    plan = plan_shards(blob_specs())
    rng = np.random.default_rng(7)
    digests = {}
    with BundleWriter(final.with_suffix(".partial"), plan) as writer:
        writer.create()
        for blob in blob_specs():
            with writer.open_blob(blob.name) as sink:
                data = rng.integers(0, 256, blob.num_bytes, dtype=np.uint8)
                data[data == 128] = 127  # no packer writes the code -128
                sink.write(data)
                digests[blob.name] = sink.close()
        asset = writer.write_asset("tokenizer.json", TOKENIZER)
        manifest = Manifest(
            tool_version="0.1.0",
            spec=spec_of(TINY),
            layouts=LAYOUTS,
            files=plan.file_records(),
            blobs=plan.blob_records(digests),
            assets=(asset,),
            sources=(SourceRecord("model.safetensors", "safetensors", 123_456, "xxh3-128:00ff"),),
            recipe={"gpu": {"bits": 4, "group": 32}, "cpu": {"tiles": "q8"}, "importance": None},
            quality={"experts.gpu": {"relative_mse": 0.0094, "max_abs_error": 0.5}, "note": "measured"},
        )
        writer.finish(manifest, final)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: tests that write take ``bundle``."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.krasis"
    write_bundle(path)
    return path


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny.krasis"))
