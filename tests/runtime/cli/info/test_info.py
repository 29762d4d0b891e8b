"""krasis-info on a tiny bundle: summary, tensors, JSON, plan, environment, mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from krasis.formats.bundle.manifest import SourceRecord
from krasis.formats.bundle.reader import Bundle
from krasis.formats.native import ABI_VERSION
from krasis.runtime.cli.info import bundle_to_json, bundle_to_text
from krasis.runtime.cli.info_command import main

INTEGER, NUMBER, TEXT = int, (int, float), str
MACHINE = ["--ram", "64GiB", "--cpus", "8", "--gpus", "none"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check(value: Any, schema: Any, where: str = "$") -> None:
    """A small schema: dict = exactly these keys, [x] = list of x, type or tuple of types = instance."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            check(item, schema[0], f"{where}[{index}]")
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"
        if schema is INTEGER:
            assert not isinstance(value, bool), where


NONE = type(None)
FIGURE = {"value": NUMBER, "source": TEXT, "note": TEXT}
TIER = {
    "layout": TEXT,
    "num_bytes": INTEGER,
    "num_blobs": INTEGER,
    "files": [{"name": TEXT, "num_bytes": INTEGER}],
}
BUNDLE_SCHEMA = {
    "path": TEXT,
    "format": [INTEGER],
    "tool_version": TEXT,
    "architecture": dict,
    "model": dict,
    "parameters": {"total": INTEGER, "active": INTEGER, "experts": INTEGER},
    "tiers": {"dense": TIER, "gpu": TIER, "cpu": TIER},
    "max_context": INTEGER,
    "total_bytes": INTEGER,
    "assets": [{"name": TEXT, "num_bytes": INTEGER, "decompressed_bytes": INTEGER}],
    "sources": [{"name": TEXT, "kind": TEXT, "num_bytes": INTEGER, "digest": TEXT}],
    "recipe": dict,
    "quality": dict,
    "needs": {
        "context": INTEGER,
        "kv_bytes": INTEGER,
        "cpu_only_ram_bytes": (int, NONE),
        "cpu_experts_bytes": INTEGER,
        "gpu_experts_bytes": INTEGER,
        "least_vram_bytes": (int, NONE),
        "one_group_vram_bytes": (int, NONE),
        "decoded_token_reads_bytes": {"dense": INTEGER, "cpu_experts": INTEGER, "table": INTEGER},
    },
}
TENSOR_SCHEMA = {
    "name": TEXT,
    "tier": TEXT,
    "dtype": TEXT,
    "shape": [INTEGER],
    "layout": TEXT,
    "file": TEXT,
    "offset_bytes": INTEGER,
    "num_bytes": INTEGER,
    "xxh3_128": TEXT,
}
PLAN_SCHEMA = {
    "notes": [TEXT],
    "ranges": (dict, NONE),
    "assumptions": dict,
    "sizes": dict,
    "hardware": {
        "gpus": [
            {"vram_bytes": INTEGER, "link_gbps": FIGURE, "memory_gbps": FIGURE, "bf16_tflops": FIGURE},
        ],
        "ram_bytes": FIGURE,
        "ram_gbps": FIGURE,
        "num_cores": FIGURE,
        "cpu_gmacs": FIGURE,
        "disk_gbps": FIGURE,
        "pins_files": bool,
    },
    "workload": {
        "context": INTEGER,
        "prompt_tokens": INTEGER,
        "kv_dtype": TEXT,
        "slots": INTEGER,
        "host_kv_layers": INTEGER,
    },
    "batch_tokens": INTEGER,
    "gpus": [dict],
    "host": dict,
    "prefill": {
        "path": TEXT,
        "num_passes": INTEGER,
        **dict.fromkeys(
            ("total_s", "tokens_per_s", "dma_s", "expert_s", "dense_s", "attention_s", "exchange_s"), NUMBER
        ),
    },
    "decode": dict,
    "start_up": {"cold_s": NUMBER, "warm_s": NUMBER},
}


def test_the_summary_says_what_is_inside(pristine: Path):
    result = run(pristine)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 110
    text = " ".join(result.output.split())
    for expected in (
        "qwen3_moe, 2 layers, hidden 64",
        # 4 x 3 x 64 x 64 a layer in experts
        "98.3 K in experts",
        "4 a layer, top-2, intermediate 64",
        "4 heads, 2 KV heads, head size 16",
        "marlin-u4b8-g32-bf16",
        "cpu-q8-r32-b32",
        "cpu-000.safetensors",
        "gpu.group 32",
        "importance -",
        "model.safetensors safetensors 123.5 kB xxh3-128:00ff",
        "experts.gpu 0.9400 % 0.5 -",
        "note measured",
        "tokenizer.json",
        "850 B",
        "format 1.1, written by krasis 0.1.0",
    ):
        assert expected in text


def test_json_has_the_documented_form(pristine: Path):
    record = run_json(pristine, "--tensors", "--verify", "--plan", *MACHINE)
    check(
        record,
        {
            "krasis_info": INTEGER,
            "verify": {
                "path": TEXT,
                "intact": bool,
                "verdict": TEXT,
                "problems": [TEXT],
                "num_bytes": INTEGER,
                "seconds": float,
                "text_problems": [TEXT],
                "text_notes": [TEXT],
            },
            "bundle": BUNDLE_SCHEMA,
            "tensors": [TENSOR_SCHEMA],
            "plan": PLAN_SCHEMA,
        },
    )
    assert record["krasis_info"] == 1


def test_json_numbers_are_the_bundles(pristine: Path):
    record = run_json(pristine)["bundle"]
    # qkv 128 x 64, output 64 x 64, two norms, two head norms, router 4 x 64; twice; embedding, head, norm
    shared = 2 * (128 * 64 + 64 * 64 + 2 * 64 + 2 * 16 + 4 * 64) + 2 * 96 * 64 + 64
    expert = 3 * 64 * 64
    assert record["parameters"] == {
        "total": shared + 2 * 4 * expert,
        "active": shared + 2 * 2 * expert,
        "experts": 2 * 4 * expert,
    }
    for tier in ("dense", "gpu", "cpu"):
        (file,) = record["tiers"][tier]["files"]
        assert file["num_bytes"] == (pristine / file["name"]).stat().st_size
    shards = sum(path.stat().st_size for path in pristine.iterdir() if path.name != "manifest.json")
    assert record["total_bytes"] == shards
    assert record["needs"]["context"] == 512
    assert record["needs"]["kv_bytes"] == 2 * 2 * 512 * 2 * 16 * 2


def test_tensors_lists_every_blob_where_it_lies(pristine: Path):
    import safetensors

    tensors = run_json(pristine, "--tensors")["tensors"]
    for path in sorted(pristine.glob("*.safetensors")):
        with safetensors.safe_open(path, "numpy") as file:
            stored = {name for name in file.keys() if not name.startswith("_padding")}  # noqa: SIM118
        assert {tensor["name"] for tensor in tensors if tensor["file"] == path.name} == stored
    result = run(pristine, "--tensors")
    rows = result.output.splitlines()
    assert len(rows) == len(tensors) + 2
    assert "layers.1.experts.gpu" in result.output
    offsets = [tensor["offset_bytes"] for tensor in tensors if tensor["tier"] == "gpu"]
    assert offsets == sorted(offsets)
    assert all(offset % 2**21 == 0 for offset in offsets)


def test_a_bundle_with_one_tier_says_what_it_can_do(pristine: Path):
    with Bundle.open(pristine) as opened:
        whole = opened.manifest
    blobs = tuple(blob for blob in whole.blobs if blob.tier != "gpu")
    files = tuple(file for file in whole.files if not file.name.startswith("gpu"))
    layouts = {tier: layout for tier, layout in whole.layouts.items() if tier != "gpu"}
    record = bundle_to_json(
        dataclasses.replace(whole, blobs=blobs, files=files, layouts=layouts), "cpu.krasis"
    )
    assert record["needs"]["least_vram_bytes"] is None
    assert record["needs"]["cpu_only_ram_bytes"] > record["tiers"]["cpu"]["num_bytes"]
    text = bundle_to_text(record)
    assert "GPU experts" not in text
    assert "with a GPU" not in text


def test_an_empty_record_is_said_to_be_empty(pristine: Path):
    with Bundle.open(pristine) as opened:
        bare = dataclasses.replace(opened.manifest, recipe={}, quality={}, sources=(), assets=())
    text = bundle_to_text(bundle_to_json(bare, "bare.krasis"))
    assert text.count("(not recorded)") == 3
    assert "no tokenizer" in text


def test_escape_sequences_of_a_hostile_bundle_do_not_reach_the_terminal(pristine: Path):
    nasty = "\x1b]0;owned\x07\r\nintact"
    with Bundle.open(pristine) as opened:
        sources = (SourceRecord(nasty, nasty, 1, nasty),)
        hostile = {nasty: {"relative_mse": 0.5}, "other": {nasty: nasty}}
        manifest = dataclasses.replace(
            opened.manifest, tool_version=nasty, sources=sources, recipe={nasty: [nasty]}, quality=hostile
        )
    text = bundle_to_text(bundle_to_json(manifest, "x.krasis"))
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith("intact") for line in text.split("\n"))


def test_plan_of_a_bundle_on_a_described_machine(pristine: Path):
    result = run(pristine, "--plan", "--gpus", "2x8GiB", "--ram", "64GiB", "--cpus", "8", "--pcie-gbps", "13")
    assert result.exit_code == 0, result.output
    assert "sizes from the bundle" in result.output
    assert "2 x 8 GiB" in result.output
    assert "13 GB/s each (given)" in result.output
    assert "(assumed: 12 GB/s a core" in result.output
    assert "all 4 experts live in VRAM" in result.output  # 2 layers x 2 of 4 experts on each rank
    assert max(map(len, result.output.splitlines())) <= 110


def test_plan_without_a_model():
    record = run_json(
        "--plan",
        "--shape",
        "qwen3-235b-a22b",
        "--gpus",
        "3x16GiB",
        "--pcie-gbps",
        "13",
        "--ram",
        "1TiB",
        "--cpus",
        "64",
    )["plan"]
    check(record, PLAN_SCHEMA)
    assert [gpu["num_experts"] for gpu in record["gpus"]] == [43, 43, 42]
    assert record["hardware"]["gpus"][0]["link_gbps"] == {"value": 13.0, "source": "given", "note": ""}
    assert record["hardware"]["ram_bytes"] == {"value": 2**40, "source": "given", "note": ""}
    assert record["hardware"]["ram_gbps"]["source"] == "assumed"
    assert record["workload"] == {
        "context": 12_048,
        "prompt_tokens": 10_000,
        "kv_dtype": "f16",
        "slots": 1,
        "host_kv_layers": 0,
    }


def test_plan_for_this_machine_measures_it(pristine: Path):
    record = run_json(pristine, "--plan", "--gpus", "none")["plan"]
    hardware = record["hardware"]
    assert hardware["num_cores"]["value"] == len(os.sched_getaffinity(0))
    assert hardware["ram_bytes"]["source"] == "measured"
    assert hardware["ram_gbps"]["source"] == "measured"
    assert 0.5 < hardware["ram_gbps"]["value"] < 5000
    assert "MiB by all threads" in hardware["ram_gbps"]["note"]


def test_every_rate_can_be_given(pristine: Path):
    flags = {
        "--pcie-gbps": ("link_gbps", 11.0),
        "--gpu-gbps": ("memory_gbps", 222.0),
        "--gpu-tflops": ("bf16_tflops", 33.0),
        "--ram-gbps": ("ram_gbps", 44.0),
        "--cpu-gmacs": ("cpu_gmacs", 55.0),
        "--disk-gbps": ("disk_gbps", 6.0),
    }
    arguments = [text for flag, (_, value) in flags.items() for text in (flag, str(value))]
    hardware = run_json(pristine, "--plan", "--gpus", "1GiB", *arguments)["plan"]["hardware"]
    figures = hardware | hardware["gpus"][0]
    for name, value in flags.values():
        assert figures[name] == {"value": value, "source": "given", "note": ""}


def test_env_works_without_a_bundle():
    result = run("--env")
    assert result.exit_code == 0, result.output
    for part in ("CPU", "kernels", "NUMA", "huge pages", "Native libraries", "torch", "What is off, and why"):
        assert part in result.output
    everything = run_json("--env")
    record = everything["environment"]
    import torch

    assert record["torch"]["version"] == torch.__version__
    assert record["libraries"]["cpu_abi"] == ABI_VERSION
    assert set(everything["pinned_memory"]) in ({"problem"}, {"problem", "trials", "rates"})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to show"),
        (["--plan"], "a BUNDLE or --shape is needed"),
        (["--verify"], "a BUNDLE is needed"),
        (["--tensors"], "a BUNDLE is needed"),
        (["--shape", "qwen3-30b-a3b"], "nothing to show"),
        (["--env", "--shape", "qwen3-30b-a3b"], "--shape stands in for a BUNDLE"),
        (["--plan", "--shape", "gpt-9"], "qwen3-235b-a22b"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--gpus", "three"], "--gpus"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--ram", "lots"], "--ram"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--context", "99999999"], "--context"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--pcie-gbps", "nan"], "pcie"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--pcie-gbps", "0"], "pcie"),
        (["--plan", "--shape", "qwen3-30b-a3b", "--pcie-gbps", "inf"], "positive"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], sentence: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_what_does_not_fit_exits_6_with_the_numbers():
    result = run("--plan", "--shape", "qwen3-235b-a22b", "--gpus", "none", "--ram", "64GiB", "--cpus", "8")
    assert result.exit_code == 6
    assert result.stderr.count("\n") == 1
    # In 4 bits: 94 layers x 128 experts x 18.9 M weights x 4.5 bits, and 13.2 GB beside them.
    assert "needs 140.9 GB: CPU experts 127.7 GB" in result.stderr
    assert "has 68.7 GB" in result.stderr


def test_what_is_not_a_bundle_is_one_line(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        result = run(path)
        assert result.exit_code == 3
        assert result.stderr.startswith("krasis-info: ")
        assert result.stderr.count("\n") == 1


def test_a_pipe_that_closes_early_is_no_traceback(pristine: Path):
    command = f"{sys.executable} -m krasis.runtime.cli.info_command {pristine} --tensors | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


def test_a_bundle_needs_no_more_than_its_manifest_and_headers(bundle: Path):
    """The data does not matter to the summary: the shard is replaced by a sparse file of its size."""
    shard = bundle / "cpu-000.safetensors"
    header = shard.read_bytes()[: 2**21]
    size = shard.stat().st_size
    with shard.open("wb") as file:
        file.write(header)
        file.truncate(size)
    assert run(bundle).exit_code == 0
    assert run(bundle, "--verify").exit_code == 3
    shutil.rmtree(bundle)
