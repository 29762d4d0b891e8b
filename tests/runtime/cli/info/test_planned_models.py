"""krasis-info --plan of models that are no bundles: config.json, a checkpoint, a name on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from loopback_hub import LoopbackHub, Model, use_hub

from krasis.runtime.cli.info_command import main

ROOT = Path(__file__).parents[4]
CONFIGS = ROOT / "tests/formats/models/configs"
MACHINE = ("--gpu", "rtx4090x2", "--memory", "8xDDR4-3200", "--ram", "1536GiB", "--cpus", "64")
TOO_LARGE = {"deepseek-v4-pro"}  # its dense weights exceed a GPU of 24 GiB


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def plan(*arguments: object) -> dict:
    result = run("--plan", "--json", *arguments, *MACHINE)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(CONFIGS / "qwen3-30b-a3b.json", folder / "config.json")
    (folder / "model.safetensors.index.json").write_text("{}")
    for number in (1, 2):
        (folder / f"model-{number:05d}-of-00002.safetensors").write_bytes(bytes(100_000 * number))
    (folder / "consolidated.safetensors").write_bytes(bytes(500_000))
    hub = LoopbackHub()
    hub.models["org/model"] = Model(folder)
    use_hub(monkeypatch, hub, tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.close()


def test_of_a_name_nothing_but_its_config_is_fetched(hub):
    record = plan("org/model")
    conversion = record["conversion"]
    assert conversion["download_bytes"] == 300_000
    assert conversion["commit"] == hub.models["org/model"].at("main")[0]
    assert conversion["cpu_format"] == "q8"
    assert 46e9 < conversion["bundle_bytes"] < 48e9
    gets = [path for method, path, _, _ in hub.requests if method == "GET" and "resolve" in path]
    assert [path.rpartition("/")[2] for path in gets] == ["config.json"]
    assert hub.sent < 5000


def test_in_words(hub):
    result = run("--plan", "org/model", *MACHINE)
    for text in (
        "download     300.0 kB",
        "CPU experts  q8: it fits in RAM beside the GPU's experts",
        "krasis-convert org/model -o model.krasis",
        "rtx4090, PCIe 4.0 x16",
        "8 channels of DDR4-3200",
        "If assumed rates are 25% lower to 10% higher",
    ):
        assert text in result.stdout


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_family(path):
    result = run("--plan", "--json", path, *MACHINE)
    if path.stem in TOO_LARGE:
        assert result.exit_code == 6
        assert "do not fit in VRAM" in result.stderr
        return
    record = json.loads(result.stdout)
    assert record["plan"]["decode"]["total_s"] > 0
    low, high = record["plan"]["ranges"]["decode_tokens_per_s"]
    assert low < 1 / record["plan"]["decode"]["total_s"] < high


def test_folders_and_formats(tmp_path):
    shutil.copy(CONFIGS / "olmoe-1b-7b.json", tmp_path / "config.json")
    best = plan(tmp_path)["conversion"]
    small = plan(tmp_path / "config.json", "--cpu-format", "int4", "--gpu-group", "64")["conversion"]
    assert small["bundle_bytes"] < best["bundle_bytes"]
    assert (small["cpu_format"], small["gpu_layout"]) == ("int4", "marlin-u4b8-g64-bf16")
    shape = plan("--shape", "olmoe-1b-7b", "--cpu-format", "int4", "--gpu-group", "64")["conversion"]
    assert shape["bundle_bytes"] == small["bundle_bytes"]


def test_a_plan_is_what_the_conversion_will_be(tmp_path):
    """Of the trained model: the bytes of the bundle's blobs."""
    from krasis.convert.conversion import dry_run, prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    model = ROOT / "tests/assets/tiny-qwen3-moe"
    conversion = plan(model)["conversion"]
    prepared = prepare([model], tmp_path / "x.krasis", ConvertSettings(), Reporter(0))
    tiers = dry_run(prepared).tier_bytes
    assert conversion["gpu_experts_bytes"] == tiers["gpu"]
    assert conversion["cpu_experts_bytes"] == tiers["cpu"]
    assert conversion["dense_bytes"] == pytest.approx(tiers["dense"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("org/none",), 2, "no such model on the hub"),
        (("org/model", "--verify"), 2, "a BUNDLE is needed"),
        (("org/model", "--gpus", "24GiB"), 2, "--gpu and --gpus both"),
        (("org/model", "--ram-gbps", "100"), 2, "--memory and --ram-gbps both"),
        (("missing.json",), 3, "missing.json"),
        (("missing.krasis",), 3, "missing.krasis"),
        (("org/empty",), 2, "no config.json on the hub"),
    ],
)
def test_one_sentence(hub, tmp_path, arguments, code, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.models["org/empty"] = Model(tmp_path / "empty")
    result = run("--plan", *arguments, *MACHINE)
    assert result.exit_code == code, result.stderr
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1


PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
QUANTISED = {
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": PACKED}},
        },
        ("marlin-u4b8-g32-bf16", "cpu-i4-r32-b32"),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
        ("marlin-u4b8-g128-bf16", "cpu-i4-r32-b32"),
    ),
    "ordered": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": True},
        ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32"),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
        ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32"),
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, ("marlin-e2m1-g32-e8m0", "cpu-mxfp4-r32-b32")),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32"),
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_checkpoints_have_the_formats_that_keep_them(kind, tmp_path):
    """As krasis-convert chooses them."""
    settings, layouts = QUANTISED[kind]
    config = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    conversion = plan(tmp_path / "config.json")["conversion"]
    assert (conversion["gpu_layout"], conversion["cpu_layout"]) == layouts


def test_a_plan_says_what_is_not_converted(tmp_path):
    config = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text("utf-8"))
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    result = run("--plan", tmp_path / "config.json", *MACHINE)
    assert result.exit_code == 0
    assert "krasis-convert refuses this checkpoint" in result.stdout
    assert "bitsandbytes" in result.stdout
