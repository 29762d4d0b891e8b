"""A bundle of format 1.0 opens, runs and is changed as it always was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from krasis.convert.cli import main as convert_main
from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.refresh import replace_assets
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.models.uniform import architecture_of
from krasis.runtime import Engine, EngineSettings

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe"
# The record that krasis-convert wrote of this model in format 1.0.
ARCHITECTURE = {
    "expert_intermediate_size": 128,
    "head_dim": 64,
    "hidden_size": 256,
    "max_positions": 2048,
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 1.0,
        "kind": "none",
        "original_max_positions": 0,
        "truncate": True,
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}


def convert(path: Path) -> Path:
    with pytest.raises(SystemExit) as ended:
        convert_main([str(TINY), "-o", str(path), "--tiers", "cpu", "--quiet"])
    assert not ended.value.code
    return path


def as_1_0(bundle: Path) -> Path:
    """Makes the manifest the one that format 1.0 had."""
    record = json.loads((bundle / "manifest.json").read_text("ascii"))
    del record["checksum"], record["model"]
    record |= {"format_minor": 0, "architecture": ARCHITECTURE}
    text = json.dumps(record, sort_keys=True, indent=1) + "\n"
    record["checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
    (bundle / "manifest.json").write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
    return bundle


def test_it_is_the_same_model(tmp_path: Path) -> None:
    new, old = convert(tmp_path / "new.krasis"), as_1_0(convert(tmp_path / "old.krasis"))
    assert verify_bundle(old) == []
    with Bundle.open(new) as ours, Bundle.open(old) as theirs:
        assert (theirs.manifest.format_minor, ours.manifest.format_minor) == (0, 1)
        assert theirs.spec == ours.spec
        assert theirs.architecture.to_json() == ARCHITECTURE == architecture_of(ours.spec, "").to_json()
    settings = EngineSettings(device="cpu", context=64, threads=1)
    logits = []
    for path in (new, old):
        with Engine.open(path, settings) as engine:
            logits.append(np.array(engine.prefill([5, 6, 7, 8])))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_other_text_files_leave_it_of_its_format(tmp_path: Path) -> None:
    bundle = as_1_0(convert(tmp_path / "old.krasis"))
    replace_assets(bundle, {"generation_config.json": b'{"temperature": 0.5}'})
    record = json.loads((bundle / "manifest.json").read_text("ascii"))
    assert (record["format_minor"], record["architecture"]) == (0, ARCHITECTURE)
    assert verify_bundle(bundle) == []
