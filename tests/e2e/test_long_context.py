"""Every spelling of a long context gives the text of the reference that reads the same file: transformers for
a checkpoint, llama.cpp (where its package is installed) and the equal transformers model for a GGUF."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

from tiny_gguf import llama_logits, mean_kl, read_tensors, write_tiny_gguf

from krasis.formats.architecture import Architecture, from_gguf_metadata, from_hf_config
from krasis.formats.checkpoints.gguf import GgufCheckpoint
from krasis.formats.errors import MismatchError
from krasis.formats.models.uniform import spec_of
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.open_backend import open_backend

CHECKPOINT = Path(__file__).parent.parent / "assets" / "tiny-qwen3-moe"
NUM_TOKENS = 320
INT8_NOISE = 2e-3  # mean KL of 8-bit weights and activations to float32, on this model 4e-4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 256}

# name -> (changes of config.json, the longest context)
CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 2048),
    "as the model card says": ({"rope_scaling": {**YARN, "original_max_position_embeddings": 2048}}, 8192),
    "old spelling": ({"rope_scaling": OLD_YARN}, 2048),
    "longer positions too": ({"rope_scaling": YARN, "max_position_embeddings": 1024}, 1024),
    "without an original length": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192),
    "betas": ({"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}}, 2048),
    "attention factor": ({"rope_scaling": {**YARN, "attention_factor": 0.9}}, 2048),
    "mscale": ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, 2048),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 4096),
    "version 5": ({"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 10000.0}}, 2048),
    "dual chunks": (
        {
            "max_position_embeddings": 1010000,
            "dual_chunk_attention_config": {
                "chunk_size": 1024,
                "local_size": 32,
                "original_max_position_embeddings": 1024,
            },
        },
        1024,
    ),
}
# name -> (keys below rope., the same in transformers' words, the longest context)
GGUFS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, int]] = {
    "plain": ({}, None, 2048),
    "linear": (
        {"scaling.type": "linear", "scaling.factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
        4096,
    ),
    "factor without a type": ({"scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, 4096),
    "the old name": ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}, 4096),
    "both names": (
        {"scale_linear": 2.0, "scaling.factor": 3.0},
        {"rope_type": "linear", "factor": 3.0},
        6144,
    ),
    "none": ({"scaling.type": "none", "scaling.factor": 2.0}, None, 2048),
    "yarn": (YARN_KEYS, YARN, 2048),
    "yarn, factor by its old name": (
        {"scaling.type": "yarn", "scale_linear": 4.0, "scaling.original_context_length": 256},
        YARN,
        2048,
    ),
    "yarn without an original length": (
        {"scaling.type": "yarn", "scaling.factor": 4.0},
        {**YARN, "original_max_position_embeddings": 2048},
        8192,
    ),
    "yarn, factor 0": ({**YARN_KEYS, "scaling.factor": 0.0}, None, 2048),
    "attention factor": (
        {**YARN_KEYS, "scaling.attn_factor": 0.8},
        {**YARN, "attention_factor": 0.8 * (0.1 * np.log(4.0) + 1.0)},
        2048,
    ),
    # Written by converters, read by llama.cpp for other architectures only.
    "betas": ({**YARN_KEYS, "scaling.yarn_beta_fast": 8.0, "scaling.yarn_beta_slow": 2.0}, YARN, 2048),
    "yarn's attention factor": ({**YARN_KEYS, "scaling.yarn_attn_factor": 0.8}, YARN, 2048),
    "extrapolation factor": ({**YARN_KEYS, "scaling.yarn_ext_factor": 0.5}, YARN, 2048),
    "log multiplier": ({**YARN_KEYS, "scaling.yarn_log_multiplier": 0.1}, YARN, 2048),
    "finetuned": ({**YARN_KEYS, "scaling.finetuned": True}, YARN, 2048),
}


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = (CHECKPOINT / "heldout.txt").read_text("utf-8")
    return tokenizer.encode(text[: 8 * NUM_TOKENS]).ids[:NUM_TOKENS]


@pytest.fixture(scope="module")
def transformers_logits(
    tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., np.ndarray]:
    """(changes of config.json, tensors=None) -> float32 logits of the committed model."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    known: dict[str, np.ndarray] = {}

    def run(changes: dict[str, Any], folder: Path | None = None) -> np.ndarray:
        key = json.dumps(changes, sort_keys=True) if folder is None else str(folder)
        if key not in known:
            folder = folder or copy_checkpoint(tmp_path_factory.mktemp("reference"), changes)
            model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                known[key] = np.asarray(model(torch.tensor([tokens])).logits[0].numpy())
        return known[key]

    return run


def convert(source: Path, out: Path) -> Path:
    from krasis.convert.conversion import convert as run
    from krasis.convert.conversion import prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    reporter = Reporter(0)
    run(prepare([source], out, ConvertSettings(num_threads=2, tiers=("cpu",)), reporter), reporter)
    return out


def copy_checkpoint(folder: Path, changes: dict[str, Any]) -> Path:
    for file in CHECKPOINT.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder / file.name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def our_logits(bundle: Path, tokens: list[int], architecture: Architecture | None = None) -> np.ndarray:
    def make(opened: Any, settings: EngineSettings) -> Any:
        if architecture is not None:
            opened.run_as(spec_of(architecture))
        return open_backend(opened, settings)

    settings = EngineSettings(context=NUM_TOKENS, threads=1, prefault=False, device="cpu")
    with Engine.open(bundle, settings, make_backend=make) as engine:
        return engine.prefill(tokens, all_logits=True)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_read_as_transformers_reads_it(
    case: str, trained_bundle: Path, tokens: list[int], transformers_logits: Callable[..., np.ndarray]
) -> None:
    changes, longest = CHECKPOINTS[case]
    config = json.loads((CHECKPOINT / "config.json").read_text()) | changes
    architecture = from_hf_config(config, "config.json")
    assert architecture.max_context == longest
    expected = transformers_logits(changes)
    assert mean_kl(expected, our_logits(trained_bundle, tokens, architecture)) < INT8_NOISE
    if architecture.rope_scaling.kind != "none":  # or this test could not fail
        assert mean_kl(expected, our_logits(trained_bundle, tokens)) > 10 * INT8_NOISE


@pytest.fixture(scope="module")
def plain_gguf(tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    return GgufCheckpoint.open(write_tiny_gguf(path, CHECKPOINT, {}))


def read_gguf(plain: GgufCheckpoint, rope: dict[str, Any]) -> Architecture:
    as_stored = {key: float(np.float32(one)) if isinstance(one, float) else one for key, one in rope.items()}
    metadata = {**plain.metadata, **{f"qwen3moe.rope.{key}": value for key, value in as_stored.items()}}
    return from_gguf_metadata(metadata, plain.tensors)


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_is_read_as_the_equal_checkpoint(
    case: str,
    plain_gguf: GgufCheckpoint,
    trained_bundle: Path,
    tokens: list[int],
    transformers_logits: Callable[..., np.ndarray],
) -> None:
    keys, same, longest = GGUFS[case]
    architecture = read_gguf(plain_gguf, keys)
    assert architecture.max_context == longest
    found = our_logits(trained_bundle, tokens, architecture)
    assert mean_kl(transformers_logits({"rope_scaling": same}), found) < INT8_NOISE


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_is_read_as_llama_cpp_reads_it(
    case: str, plain_gguf: GgufCheckpoint, trained_bundle: Path, tokens: list[int], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    path = write_tiny_gguf(tmp_path / "model.gguf", CHECKPOINT, GGUFS[case][0])
    checkpoint = GgufCheckpoint.open(path)
    architecture = from_gguf_metadata(checkpoint.metadata, checkpoint.tensors)
    assert architecture == read_gguf(plain_gguf, GGUFS[case][0])
    found = our_logits(trained_bundle, tokens, architecture)
    assert mean_kl(llama_logits(path, tokens), found) < INT8_NOISE


@pytest.fixture(scope="module")
def other_head() -> dict[str, np.ndarray]:
    """The committed model's tensors, and a head that is not its embedding."""
    tensors = dict(read_tensors(CHECKPOINT))
    tensors["lm_head.weight"] = np.roll(tensors["model.embed_tokens.weight"], 7, axis=0)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    halves = {name: torch.tensor(one).to(torch.bfloat16) for name, one in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", ["another head", "the same head", "only a head"])
def test_a_tied_checkpoint_with_a_head_is_loaded_as_transformers_does(
    case: str,
    other_head: dict[str, np.ndarray],
    tokens: list[int],
    transformers_logits: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    tensors = dict(other_head)
    if case != "another head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    if case == "only a head":
        del tensors["model.embed_tokens.weight"]
    folder = write_tensors(tmp_path / "hf", tensors)
    bundle = convert(folder, tmp_path / "tied.krasis")
    expected = transformers_logits({}, folder)
    assert mean_kl(expected, our_logits(bundle, tokens)) < INT8_NOISE


def test_a_gguf_with_a_head_uses_it(
    other_head: dict[str, np.ndarray],
    tokens: list[int],
    transformers_logits: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", CHECKPOINT, {"scale_linear": 2.0}, tensors=other_head)
    found = our_logits(convert(path, tmp_path / "model.krasis"), tokens)
    folder = write_tensors(tmp_path / "hf", other_head)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0}
    changed = {**config, "rope_scaling": scaling, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(changed))
    assert mean_kl(transformers_logits({}, folder), found) < INT8_NOISE
    pytest.importorskip("llama_cpp")
    assert mean_kl(llama_logits(path, tokens), found) < INT8_NOISE


# ---- --rope-scaling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "same"),
    [
        ("yarn,4,256", YARN),
        ("yarn,4", {**YARN, "original_max_position_embeddings": 2048}),
        ("linear,2", {"rope_type": "linear", "factor": 2.0}),
        ("yarn,4,256,beta_fast=8,beta_slow=2", {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}),
        ("yarn,4,256,attention_factor=0.9", {**YARN, "attention_factor": 0.9}),
    ],
)
def test_the_option_gives_what_a_changed_config_gives(
    option: str,
    same: dict[str, Any],
    trained_bundle: Path,
    tokens: list[int],
    transformers_logits: Callable[..., np.ndarray],
) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text()) | {"rope_scaling": same}
    longest = from_hf_config(config, "config.json").max_context
    settings = EngineSettings(context=longest, threads=1, prefault=False, device="cpu", rope_scaling=option)
    with Engine.open(trained_bundle, settings) as engine:
        found = engine.prefill(tokens, all_logits=True)
    assert mean_kl(transformers_logits({"rope_scaling": same}), found) < INT8_NOISE


def test_a_prefix_of_another_scaling_is_refused(
    trained_bundle: Path, tokens: list[int], tmp_path: Path
) -> None:
    def settings(option: str | None) -> EngineSettings:
        return EngineSettings(context=64, threads=1, prefault=False, device="cpu", rope_scaling=option)

    with Engine.open(trained_bundle, settings("yarn,4,256")) as engine:
        engine.prefill(tokens[:20])
        engine.save_prefix(tmp_path / "prefix.kv")
    for option in (None, "yarn,2,256", "linear,4"):
        with (
            Engine.open(trained_bundle, settings(option)) as engine,
            pytest.raises(MismatchError, match="rope"),
        ):
            engine.load_prefix(tmp_path / "prefix.kv")
    with Engine.open(trained_bundle, settings("yarn,4,256")) as engine:
        engine.load_prefix(tmp_path / "prefix.kv")
        assert list(engine.tokens) == tokens[:20]
