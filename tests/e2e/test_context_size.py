"""The context that is chosen when nobody says: what RAM or VRAM has room for, and what counts as room."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from krasis.formats.bundle.reader import Bundle
from krasis.formats.models.mixers import Attention
from krasis.runtime import Engine, EngineSettings, context_size
from krasis.runtime.cli.run import main
from krasis.runtime.context_size import tokens_in_ram, tokens_in_vram
from krasis.runtime.host.filesystem import filesystem_of_path
from krasis.runtime.planning import assumptions, sizes_of_bundle
from krasis.runtime.planning.presets import shape
from tests.support.tiny_drafting import converted, tiny_drafting

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- a file in RAM is what is wanted
TIERS = ("dense", "cpu")
TOKEN_BYTES = 2 * 2 * 2 * 32 * 2  # keys and values, 2 layers, 2 heads of 32, f16
LONGEST = 32768


@pytest.fixture
def bundle(chat_bundle: Path) -> Iterator[Bundle]:
    with Bundle.open(chat_bundle) as opened:
        assert opened.architecture.max_positions == LONGEST
        yield opened


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(available RAM, file system of the bundle) as if the machine had them."""

    def pretend(available: int | None, filesystem: str = "ext4") -> None:
        monkeypatch.setattr(context_size, "available_memory_bytes", lambda: available)
        monkeypatch.setattr("krasis.runtime.host.filesystem.filesystem_of_path", lambda _: filesystem)

    return pretend


def weights_bytes(bundle: Bundle) -> int:
    return sum(blob.num_bytes for blob in bundle.manifest.blobs if blob.tier in TIERS)


def test_half_of_the_ram_that_weights_leave(bundle: Bundle, memory: Callable[..., None]) -> None:
    room = 2 * 20480 * TOKEN_BYTES
    for filesystem, held in (("ext4", weights_bytes(bundle)), ("tmpfs", 0), ("hugetlbfs", 0)):
        memory(held + room, filesystem)
        assert tokens_in_ram(bundle, TIERS, "f16") == 20480
        assert tokens_in_ram(bundle, TIERS, "f32") == 10240
        memory(held + room - 2, filesystem)
        assert tokens_in_ram(bundle, TIERS, "f16") == 20480 - 1024


def test_the_layer_that_drafts_has_keys_of_its_own(
    memory: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers of glm4_moe's tiny model are alike, the one that drafts among them."""
    monkeypatch.setattr(context_size, "STEP_TOKENS", 1)
    monkeypatch.setattr(context_size, "LEAST_TOKENS", 1)
    with Bundle.open(converted(tiny_drafting("glm4_moe", tmp_path / "hf"))) as bundle:
        layers = [one.mixer for one in bundle.manifest.spec.layers]
        sizes = {(one.kv_heads, one.head_dim) for one in layers if isinstance(one, Attention)}
        assert len(sizes) == 1
        token_bytes = 2 * 2 * math.prod(sizes.pop())  # keys and values, f16
        memory(2 * 12 * (len(layers) - 1) * token_bytes, "tmpfs")
        monkeypatch.setattr(context_size, "weights_to_hold_bytes", lambda *_: 0)
        assert tokens_in_ram(bundle, TIERS, "f16") == 12
        assert tokens_in_ram(bundle, TIERS, "f16", drafts=True) == 12 * (len(layers) - 1) // len(layers)


def test_windows_take_no_more_with_a_longer_context(
    memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss-120b: 18 of 36 layers keep all, 2 x 8 heads of 64; the others 192 positions, and four copies of
    the last 144."""
    spec = shape("gpt-oss-120b")
    monkeypatch.setattr(context_size, "weights_to_hold_bytes", lambda *_: 0)
    layers = 18 * 2 * 8 * 64 * 2
    memory(2 * layers * (20480 + 192 + 4 * 144))
    assert tokens_in_ram(SimpleNamespace(spec=spec), TIERS, "f16") == 20480  # type: ignore[arg-type]
    memory(2 * layers * (20480 + 192 + 4 * 144) - 2)
    assert tokens_in_ram(SimpleNamespace(spec=spec), TIERS, "f16") == 20480 - 1024  # type: ignore[arg-type]
    alike = dataclasses.replace(spec, layers=spec.layers[:1] * 36)  # all have a window
    assert tokens_in_ram(SimpleNamespace(spec=alike), TIERS, "f16") >= spec.max_context  # type: ignore[arg-type]


def test_8_bits_have_room_for_nearly_twice_as_much(bundle: Bundle, memory: Callable[..., None]) -> None:
    memory(2 * 18432 * 2 * 2 * 2 * (32 + 4), "tmpfs")
    assert tokens_in_ram(bundle, TIERS, "int8") == 18432


def test_not_less_than_a_prompt_of_8192_by_itself(
    bundle: Bundle, memory: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for available in (None, 1, 1 << 20):
        memory(available)
        assert tokens_in_ram(bundle, TIERS, "f16") == 8192
    # Weights that RAM cannot hold are read from the disk anyway: a sixteenth of RAM is the cache's.
    memory(16 * 12288 * TOKEN_BYTES)
    monkeypatch.setattr(context_size, "weights_to_hold_bytes", lambda *_: 1 << 50)
    assert tokens_in_ram(bundle, TIERS, "f16") == 12288


def test_a_fifth_of_vram(bundle: Bundle) -> None:
    sizes = sizes_of_bundle(bundle.manifest)
    fixed = assumptions.GPU_RESERVE_BYTES + sizes.dense_bytes
    assert sizes.kv_bytes(1, "bf16") == TOKEN_BYTES
    for vram_bytes in (fixed + 1, fixed + 2 * 8192 * TOKEN_BYTES, 1 << 20):
        assert tokens_in_vram(sizes, vram_bytes, "bf16") == 8192
    # Little is left: half of that. Much is left: a fifth of all.
    assert tokens_in_vram(sizes, fixed + 2 * 12288 * TOKEN_BYTES, "bf16") == 12288
    assert tokens_in_vram(sizes, 16 << 30, "bf16") == int(0.2 * (16 << 30)) // TOKEN_BYTES // 1024 * 1024


def test_the_engine_takes_it_and_says_so(
    chat_bundle: Path, memory: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = EngineSettings(threads=1, device="cpu", prefault=False)
    memory(2 * 20480 * TOKEN_BYTES, "tmpfs")
    with caplog.at_level(logging.INFO), Engine.open(chat_bundle, settings) as engine:
        assert engine.context == 20480
        assert len(engine.prefill(list(range(9)) * 20)) > 0
    assert f"context: 20480 tokens of the model's {LONGEST} have room in RAM" in caplog.text
    caplog.clear()
    memory(1 << 40, "tmpfs")
    with caplog.at_level(logging.INFO), Engine.open(chat_bundle, settings) as engine:
        assert engine.context == LONGEST
    assert "have room in RAM" not in caplog.text
    memory(1)
    with Engine.open(chat_bundle, EngineSettings(context=300, threads=1, device="cpu")) as engine:
        assert engine.context == 300  # who says so gets it


def test_a_gpu_engine_is_sized_by_vram(
    make_bundle: Callable[..., Path], make_config: Callable[..., Any], open_gpu: Callable[..., Any]
) -> None:
    """Half of what dense weights and reserve leave of a small card."""
    config = make_config(num_key_value_heads=4, max_position_embeddings=1 << 18)
    bundle = make_bundle(config, tiers=("gpu",))
    with Bundle.open(bundle) as opened:
        sizes = sizes_of_bundle(opened.manifest)
    fixed = assumptions.GPU_RESERVE_BYTES + sizes.dense_bytes
    engine = open_gpu(bundle, vram_bytes=fixed + (160 << 20), prefill_chunk=64)
    assert sizes.kv_bytes(1, "bf16") == 1024
    assert engine.context == 80 * 1024
    assert "KV cache of 81920 tokens" in engine.description
    assert len(engine.prefill([1, 2, 3])) == 300


def test_a_bundle_in_ram_is_not_read_from_a_disk(
    chat_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However little is available beside it: its pages are in memory."""
    if not SHARED_MEMORY.is_dir() or filesystem_of_path(SHARED_MEMORY) != "tmpfs":
        pytest.skip(f"{SHARED_MEMORY} is no tmpfs")
    monkeypatch.setattr("krasis.runtime.host.prefault.available_memory_bytes", lambda: 1000)
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        in_ram = Path(shutil.copytree(chat_bundle, Path(folder) / "model.krasis"))
        options = ["--prompt", "hello", "--max-tokens", "2", "--threads", "1", "--device", "cpu"]
        said = CliRunner().invoke(main, [str(in_ram), *options])
        assert said.exit_code == 0, said.output
        assert "again and again" not in caplog.text + said.output
        memory(1000)  # and on a disk, where it is not
        said = CliRunner().invoke(main, [str(in_ram), *options, "--ctx", "100"])
        assert said.exit_code == 0, said.output
        assert "again and again" in caplog.text
