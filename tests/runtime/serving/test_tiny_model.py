"""The core over the real CPU backend and the tiny model: in company as alone, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letters import text_of, tokens_of

from krasis.formats.errors import KrasisError
from krasis.runtime.engine import Engine
from krasis.runtime.serving.api import Delta, Finished, PromptScores, Request
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import OpenedCore, open_core
from krasis.runtime.settings import EngineSettings, SamplingSettings

SETTINGS = EngineSettings(device="cpu", threads=1, context=1024, prefault=False)
PROMPTS = [
    "The license says that",
    "A list is",
    "What can be done about memory that is never freed? The first thing is to",
    "Permission is hereby granted, free of charge, to any person",
    "def main() -> None:\n",
]


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Engine]:
    """One conversation at a time: the reference."""
    with Engine.open(tiny_bundle, SETTINGS) as engine:
        yield engine


@pytest.fixture
def opened(tiny_bundle: Path) -> Iterator[OpenedCore]:
    with open_core(tiny_bundle, SETTINGS, CoreSettings(num_slots=3, cache_bytes=10**8)) as opened:
        opened.core.start()
        yield opened


def ask(opened: OpenedCore, text: str, count: int = 24, **options: Any) -> Request:
    return Request(id=text, prompt=opened.text.tokenizer.encode(text), max_tokens=count, **options)


def wanted(engine: Engine, ids: list[int], count: int, sampling: SamplingSettings) -> tuple[list[int], str]:
    engine.reset()
    answer = engine.generate(ids, sampling, max_tokens=count)
    return [piece.token for piece in answer if piece.token is not None], answer.stats.text


@pytest.mark.parametrize(
    "sampling", [SamplingSettings(), SamplingSettings(temperature=0.9, top_k=40, seed=11)]
)
def test_clients_together_get_what_each_gets_alone(
    opened: OpenedCore, alone: Engine, sampling: SamplingSettings
) -> None:
    requests = [ask(opened, text, sampling=sampling) for text in PROMPTS]
    tickets = [opened.core.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        events = list(ticket.events(60))
        tokens, text = wanted(alone, list(request.prompt), 24, sampling)
        assert tokens_of(events) == tokens
        assert text_of(events) == text
    counters = opened.core.status().counters
    assert counters.num_shared_passes >= 1
    assert counters.num_decode_rows > counters.num_decode_steps


def test_log_probabilities_are_those_of_the_logits_alone(opened: OpenedCore, alone: Engine) -> None:
    request = ask(opened, PROMPTS[2], 6, logprobs=3, prompt_logprobs=0)
    other = opened.core.submit(ask(opened, PROMPTS[0], 30))
    events = list(opened.core.submit(request).events(60))
    list(other.events(60))
    alone.reset()
    ids = [*request.prompt, *tokens_of(events)]
    logits = alone.prefill(ids, all_logits=True).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [log_probabilities[at - 1, ids[at]] for at in range(1, len(ids))]
    (prompt,) = [event.scores for event in events if isinstance(event, PromptScores)]
    answer = [event.scores[0] for event in events if isinstance(event, Delta) and event.scores]
    found = [one.logprob for one in [*prompt[1:], *answer] if one is not None]
    assert found == pytest.approx(expected, abs=1e-9)
    best = np.argsort(-log_probabilities[len(request.prompt) - 1], kind="stable")[:3]
    assert [token for token, _ in answer[0].top] == best.tolist()


@pytest.mark.parametrize("ignore_ends", [False, True])
def test_a_special_token_that_is_a_stop_is_named(opened: OpenedCore, ignore_ends: bool) -> None:
    for stop, reason in (("<|im_start|>", "stop"), ("<|im_end|>", "stop" if ignore_ends else "end")):
        number = opened.text.tokenizer.special_tokens()[stop]
        stops, bias = (stop, "no such text"), {number: 1e6}
        request = ask(opened, PROMPTS[0], stops=stops, logit_bias=bias, ignore_ends=ignore_ends)
        *others, last = opened.core.submit(request).events(60)
        assert text_of(others) == ""
        assert (last.reason, last.usage.num_generated) == (reason, 1)
        assert last.stop == (stop if reason == "stop" else "")


def test_ends_can_be_ignored(opened: OpenedCore) -> None:
    request = ask(opened, PROMPTS[0], 5, logit_bias={4095: 1e6}, ignore_ends=True)
    *_, last = opened.core.submit(request).events(60)
    assert (last.reason, last.usage.num_generated) == ("length", 5)


def test_turns_in_more_conversations_than_slots_go_on_from_ram(opened: OpenedCore, alone: Engine) -> None:
    talks = [opened.text.tokenizer.encode(text * 12) for text in PROMPTS]
    for turn in range(3):
        for number, talk in enumerate(talks):
            request = Request(id="turn", prompt=talk, max_tokens=8)
            events = list(opened.core.submit(request).events(60))
            assert tokens_of(events) == wanted(alone, talk, 8, SamplingSettings())[0]
            assert events[-1].usage.num_cached >= 0.8 * len(talk) * (turn > 0)
            more = opened.text.tokenizer.encode(PROMPTS[turn])
            talks[number] = [*talk, *tokens_of(events), *more]
    assert opened.core.status().counters.num_restored >= 5


def test_prefixes_outlive_the_process(tiny_bundle: Path, tmp_path: Path, alone: Engine) -> None:
    def talk(count: int) -> list[Finished]:
        ends = []
        with open_core(
            tiny_bundle, SETTINGS, CoreSettings(num_slots=1, cache_bytes=10**8), prefix_dir=tmp_path
        ) as opened:
            opened.core.start()
            for text in PROMPTS[:count]:
                ids = opened.text.tokenizer.encode(text * 10)
                events = list(opened.core.submit(Request(id="x", prompt=ids, max_tokens=5)).events(60))
                assert tokens_of(events) == wanted(alone, ids, 5, SamplingSettings())[0]
                ends.append(events[-1])
        return ends

    assert [end.usage.num_cached for end in talk(3)] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 3
    again = talk(3)
    assert all(end.usage.num_cached == end.usage.num_prompt - 1 for end in again)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("at", [-1000, 100])
def test_a_damaged_prefix_is_computed_again(tiny_bundle: Path, tmp_path: Path, at: int) -> None:
    def num_cached() -> int:
        with open_core(tiny_bundle, SETTINGS, CoreSettings(num_slots=1), prefix_dir=tmp_path) as opened:
            opened.core.start()
            ids = opened.text.tokenizer.encode(PROMPTS[3] * 10)
            events = list(opened.core.submit(Request(id="x", prompt=ids, max_tokens=2)).events(60))
            assert isinstance(events[-1], Finished)
            return events[-1].usage.num_cached

    assert num_cached() == 0
    (file,) = tmp_path.glob("*.kv")
    data = bytearray(file.read_bytes())
    data[at] ^= 0x55
    file.write_bytes(data)
    assert num_cached() == 0
    assert num_cached() > 100  # a sound one has taken its place


def test_what_has_no_room_in_ram_comes_back_from_disk(
    tiny_bundle: Path, tmp_path: Path, alone: Engine
) -> None:
    settings = CoreSettings(num_slots=1, cache_bytes=900_000)  # two of these prefixes
    with open_core(tiny_bundle, SETTINGS, settings, prefix_dir=tmp_path) as opened:
        opened.core.start()
        prompts = [(opened.text.tokenizer.encode(text) * 99)[:200] for text in PROMPTS]
        for turn in range(2):
            for ids in prompts:
                events = list(opened.core.submit(Request(id="x", prompt=ids, max_tokens=4)).events(60))
                assert tokens_of(events) == wanted(alone, ids, 4, SamplingSettings())[0]
                assert events[-1].usage.num_cached == (199 if turn else 0)
        assert opened.core.status().store_bytes <= 900_000
        assert len(list(tmp_path.glob("*.kv"))) >= 2


def test_a_folder_that_is_not_there_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(KrasisError, match="folder for prefixes"):
        open_core(tiny_bundle, SETTINGS, prefix_dir=tmp_path / "none")


def test_old_prefixes_make_room_on_disk(tiny_bundle: Path, tmp_path: Path) -> None:
    for text in PROMPTS[:3]:
        with open_core(
            tiny_bundle, SETTINGS, CoreSettings(num_slots=1), prefix_dir=tmp_path, prefix_dir_bytes=2_000_000
        ) as opened:
            opened.core.start()
            ids = (opened.text.tokenizer.encode(text) * 200)[:400]
            list(opened.core.submit(Request(id="x", prompt=ids, max_tokens=2)).events(60))
    sizes = [file.stat().st_size for file in tmp_path.glob("*.kv")]
    assert sizes
    assert sum(sizes) <= 2_000_000
