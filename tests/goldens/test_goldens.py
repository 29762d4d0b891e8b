"""What the project made and computed when it knew one model family: refactorings keep it, bit for bit.

Bits of the CPU kernels do not depend on the instruction set or on the number of threads, so they are compared
as digests. The float backend and the GPU's double multiply by libraries whose sums differ from CPU to CPU:
their logits are kept and compared to a hundred-thousandth of their norm where libraries and CPU are those
that made them, elsewhere to what another order of sums was seen to make of them, and some more.

These are the project's own results and prove nothing about correctness: other tests compare with transformers
and llama.cpp. ``KRASIS_RENEW_GOLDENS=1 pytest tests/goldens`` writes them anew; say in the commit which
change and why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent.parent / "assets" / "tiny-qwen3-moe"
SETTINGS = {
    "gpu-g128": ("--gpu-group", "128"),
    "gpu-g64": ("--gpu-group", "64"),
    "gpu-g32": ("--gpu-group", "32"),
    "cpu-int4": ("--tiers", "cpu", "--cpu-format", "int4"),
    "gguf-q8_0": ("GGUF", "--tiers", "cpu"),
    "gpu-alone": ("--tiers", "gpu", "--shard-size", "4MiB"),
}
"""Options of krasis-convert; GGUF stands for a Q8_0 file of the same model."""
FILE = Path(__file__).parent / "goldens.json"
RENEW = os.environ.get("KRASIS_RENEW_GOLDENS") == "1"
PROMPTS = (1, 40, 513)
NUM_DECODED = 20
TOLERANCE = 1e-5
ELSEWHERE = {
    "float, cpu experts": 1e-4,
    "float, gpu experts": 1e-4,
    "double, bf16": 1e-2,
    "double, f16": 2e-3,
}
"""With other kernels of the same libraries 2.2e-5, 1.9e-5, 2.3e-3, 2.7e-4: roundings to 16 bits turn."""
KEPT_LOGITS = 64  # of 4,096, evenly spread
MACHINES = {
    "reference, 1 GPU": ("qwen3-235b-a22b", "--gpus", "1x16GiB", "--pcie-gbps", "13", "--ram", "1TiB"),
    "reference, 3 GPUs": ("qwen3-235b-a22b", "--gpus", "3x16GiB", "--pcie-gbps", "13", "--ram", "1TiB"),
    "reference, no GPU": ("qwen3-235b-a22b", "--gpus", "none", "--ram", "1TiB"),
    "235B, little RAM": ("qwen3-235b-a22b", "--gpus", "1x24GiB", "--ram", "256GiB"),
    "30B, 24 GiB": ("qwen3-30b-a3b", "--gpus", "1x24GiB", "--ram", "64GiB"),
    "30B, 8 GiB": ("qwen3-30b-a3b", "--gpus", "1x8GiB", "--ram", "64GiB"),
    "30B, no GPU": ("qwen3-30b-a3b", "--gpus", "none", "--ram", "48GiB"),
    "30B, 2 large GPUs": ("qwen3-30b-a3b", "--gpus", "2x80GiB", "--pcie-gbps", "50", "--ram", "256GiB"),
}
HOST = (
    *("--ram-gbps", "140", "--cpus", "64", "--cpu-gmacs", "3200", "--disk-gbps", "3"),
    *("--prompt-tokens", "10000", "--json"),
)


def run_main(module: str, *arguments: str) -> str:
    """A command of the package in a process of its own; gives its stdout."""
    code = f"from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {done.stderr}")
    return done.stdout


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a setting, made once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("goldens")

    def make(name: str) -> Path:
        if name not in made:
            sources = [str(TINY)]
            if "GGUF" in SETTINGS[name]:
                gguf = folder / "tiny.gguf"
                command = [sys.executable, "-m", "scripts.models.make_tiny_model", "gguf"]
                command += ["--model", str(TINY), "--out", str(gguf)]
                subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
                sources.append(str(gguf))
            made[name] = folder / f"{name}.krasis"
            options = [option for option in SETTINGS[name] if option != "GGUF"]
            run_main("krasis.convert.cli", *sources, "-o", str(made[name]), "--quiet", *options)
        return made[name]

    return make


def kept() -> dict[str, Any]:
    """All goldens."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    return found


def compare(name: str, value: Any) -> None:
    """Raises AssertionError unless value is the golden of that name; renews it instead when asked to."""
    if RENEW:
        FILE.write_text(json.dumps(kept() | {name: value}, indent=1, sort_keys=True) + "\n", "utf-8")
    assert kept().get(name) == value


def libraries() -> str:
    """Whose sums they are."""
    import torch

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "?")
    versions = f"NumPy {np.__version__}, torch {torch.__version__}"
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, {vendor}"


def digest(data: bytes | np.ndarray) -> str:
    """xxh3-128 of bytes or of an array's bytes."""
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
    return xxhash.xxh3_128_hexdigest(raw)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_bytes_of_a_bundle(name: str, make_bundle: Callable[[str], Path]) -> None:
    shards = sorted(make_bundle(name).glob("*.safetensors"))
    compare(f"bundle {name}", {path.name: digest(path.read_bytes()) for path in shards})


def tokens_of(engine: Any, count: int) -> list[int]:
    """The first tokens of a text that was not trained on."""
    text = (TINY / "heldout.txt").read_text("utf-8")[:8000]
    ids: list[int] = engine.text.tokenizer.encode(text)[:count]
    assert len(ids) == count
    return ids


def logits_of(engine: Any) -> dict[str, list[np.ndarray]]:
    """Of the last token of each prompt, and of tokens decoded after the last one."""
    ids = tokens_of(engine, max(PROMPTS) + NUM_DECODED)
    found: dict[str, list[np.ndarray]] = {}
    for count in PROMPTS:
        engine.reset()
        found[f"prompt of {count}"] = [engine.prefill(ids[:count])]
    found["decoded"] = [np.array(engine.decode(token)) for token in ids[max(PROMPTS) :]]
    return found


@pytest.mark.parametrize(("isa", "threads"), [("avx2", 1), ("auto", 2)])
@pytest.mark.parametrize("name", ["gpu-g128", "cpu-int4", "gguf-q8_0"])
def test_the_bits_of_the_cpu(name: str, isa: str, threads: int, make_bundle: Callable[[str], Path]) -> None:
    from krasis.runtime import Engine, EngineSettings

    settings = EngineSettings(device="cpu", isa=isa, threads=threads, context=1024)
    with Engine.open(make_bundle(name), settings) as engine:
        found = logits_of(engine)
    compare(f"cpu {name}", {case: [digest(row) for row in rows] for case, rows in found.items()})


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("float, cpu experts", {"device": "cpu", "activations": "float32"}),
        ("float, gpu experts", {"device": "cpu", "activations": "float32", "experts": "gpu"}),
        ("double, bf16", {"device": "double"}),
        ("double, f16", {"device": "double", "gpu_dtype": "f16"}),
    ],
)
def test_the_logits_of_the_others(
    backend: str, settings: dict[str, Any], make_bundle: Callable[[str], Path]
) -> None:
    from krasis.formats.errors import NativeError
    from krasis.runtime import Engine, EngineSettings

    if settings["device"] == "double":
        from krasis.runtime.device.library import double_library

        try:
            double_library()
        except NativeError as error:
            pytest.skip(str(error))
    with Engine.open(make_bundle("gpu-g128"), EngineSettings(context=640, threads=1, **settings)) as engine:
        found = logits_of(engine)
    shown = {
        case: [[round(float(one), 6) for one in row[:: len(row) // KEPT_LOGITS]] for row in rows]
        for case, rows in found.items()
    }
    if RENEW:
        compare(backend, shown)
        compare("libraries", libraries())
    tolerance = TOLERANCE if kept()["libraries"] == libraries() else ELSEWHERE[backend]
    golden = kept()[backend]
    assert golden.keys() == shown.keys()
    for case, rows in golden.items():
        expected, got = np.asarray(rows), np.asarray(shown[case])
        assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected), case


def test_a_saved_prefix(make_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    from krasis.runtime import Engine, EngineSettings

    path = tmp_path / "prefix.kv"
    with Engine.open(make_bundle("gguf-q8_0"), EngineSettings(device="cpu", context=256)) as engine:
        engine.prefill(tokens_of(engine, 40))
        engine.save_prefix(path, conversation=b'{"note": "golden"}')
    with Engine.open(make_bundle("gguf-q8_0"), EngineSettings(device="cpu", context=256)) as engine:
        conversation = engine.load_prefix(path)
        logits = engine.decode(tokens_of(engine, 41)[40])
        found = {
            "conversation": conversation.decode(),
            "tokens": len(engine.tokens),
            "next logits": digest(np.array(logits)),
            "keys and values": [digest(part) for part in engine._backend.state.export(0, 0, 40)],
        }
    compare("saved prefix", found)


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_plan(name: str) -> None:
    plan = run_main("krasis.runtime.cli.info_command", "--plan", "--shape", *MACHINES[name], *HOST)
    found = json.loads(plan)
    del found["plan"]["notes"]  # they name the place of this installation's library
    del found["plan"]["ranges"]  # the same plan with other rates; younger than the goldens
    compare(f"plan {name}", found)
