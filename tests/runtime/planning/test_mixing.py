"""What a query sees of its past, and what of it is kept."""

from __future__ import annotations

import dataclasses

import pytest

from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.rope import Rope
from krasis.formats.models.selection import Selection
from krasis.formats.models.state import SNAPSHOTS, fixed_bytes
from krasis.runtime.planning import Workload, latent_workspace, make_plan, make_workload, sizes_of_shape
from krasis.runtime.planning.mixing import expansion_macs, gpu_mixer_macs, mixer_macs
from krasis.runtime.planning.presets import shape
from tests.support.planning import MIXER, mixed_spec


def pairs_by_counting(start: int, count: int, *, window: int = 10**9, chunk: int = 10**9) -> int:
    seen = 0
    for i in range(start, start + count):
        seen += min(i + 1, window, i % chunk + 1)
    return seen


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 100), (3, 10), (31, 2), (32, 200), (500, 1)])
def test_attention_sees_what_its_window_lets_it(start: int, count: int) -> None:
    pair = 8 * 2 * 64
    assert mixer_macs(MIXER, start, count) == pair * pairs_by_counting(start, count)
    window = dataclasses.replace(MIXER, window=32)
    assert mixer_macs(window, start, count) == pair * pairs_by_counting(start, count, window=32)
    chunk = dataclasses.replace(MIXER, chunk=32)
    assert mixer_macs(chunk, start, count) == pair * pairs_by_counting(start, count, chunk=32)
    chosen = dataclasses.replace(MIXER, selection=Selection("tokens", heads=2, dim=16, budget=40))
    index = 2 * 16 * pairs_by_counting(start, count)
    assert mixer_macs(chosen, start, count) == pair * pairs_by_counting(start, count, window=40) + index


def test_work_of_other_mixers() -> None:
    latent = LatentAttention(4, None, 64, 32, 16, 24, Rope(16, 1e4), 0.1)
    assert mixer_macs(latent, 0, 10) == 4 * (2 * 64 + 16) * 55  # scores and sums of latents
    delta = GatedDelta(2, 4, 16, 32, 4)
    assert mixer_macs(delta, 0, 10) == mixer_macs(delta, 1000, 10) == 10 * 3 * 4 * 16 * 32
    assert mixer_macs(None, 0, 10) == 0


def test_state_that_does_not_grow_is_counted_once() -> None:
    window = dataclasses.replace(MIXER, window=100)
    sizes = sizes_of_shape(mixed_spec(GatedDelta(2, 4, 16, 32, 4), window))
    token = 2 * 2 * 64 * 2
    fixed = 4 * 16 * 32 * 4 + (2 * 2 * 16 + 4 * 32) * 3 * 4
    assert sizes.kv_bytes(50, "bf16") == 7 * 50 * token + fixed
    assert sizes.kv_bytes(5000, "bf16") == (6 * 5000 + 100) * token + fixed
    assert sizes.kv_bytes(5000, "bf16", "rings") == (6 * 5000 + 192) * token + fixed
    # Beside states a GPU keeps all of a window's layer.
    assert sizes.kv_bytes(5000, "bf16", "whole") == 7 * 5000 * token + fixed
    room = 7 * 5000 * token + fixed + 4 * fixed  # and copies of states
    assert sizes.tokens_within(room, "bf16") == 5000
    assert sizes.tokens_within(room - 1, "bf16") == 4999
    assert sizes.tokens_within(-1, "bf16") == 0


def test_a_window_is_read_and_computed_less(machine) -> None:
    whole, less = (
        make_plan(sizes_of_shape(mixed_spec(mixer)), machine(0), Workload(8000, 8000))
        for mixer in (MIXER, dataclasses.replace(MIXER, window=100))
    )
    assert less.prefill.attention_s < whole.prefill.attention_s
    assert less.decode.kv_s < whole.decode.kv_s
    assert less.host.kv_bytes < whole.host.kv_bytes


def test_copies_of_a_state_take_ram_beside_it(machine) -> None:
    sizes = sizes_of_shape(shape("qwen3.5-35b-a3b"))
    fixed = 30 * (32 * 128 * 128 + 3 * (2 * 16 + 32) * 128) * 4
    assert fixed_bytes(sizes.spec) == fixed
    plan = make_plan(sizes, machine(0), make_workload(sizes.spec, context=8192))
    keys = 10 * 2 * 2 * 256 * 2 * 8192
    assert plan.host.kv_bytes == keys + (1 + SNAPSHOTS) * fixed


def test_a_gpu_expands_the_latents_of_many_tokens() -> None:
    latent = LatentAttention(4, None, 64, 32, 16, 24, Rope(16, 1e4), 0.1)
    least = latent_workspace.LEAST_EXPANDED
    assert gpu_mixer_macs(latent, 10, least - 1) == mixer_macs(latent, 10, least - 1)
    assert expansion_macs(latent, 10, least - 1, 1) == 0
    pairs = sum(range(11, 11 + least))
    assert gpu_mixer_macs(latent, 10, least) == 4 * (48 + 48) * pairs  # values are padded to 48 channels
    assert expansion_macs(latent, 10, least, 1) == 10 * 4 * 64 * (32 + 24)  # of the prefix
    assert expansion_macs(latent, 0, least, 3) == 2 * least * 4 * 64 * (32 + 24)  # all ranks make all
    plain = shape("qwen3-30b-a3b").layers[0].mixer
    assert gpu_mixer_macs(plain, 5, 1000) == mixer_macs(plain, 5, 1000)
    assert expansion_macs(plain, 5, 1000, 2) == 0
