"""The server drafts: clients get what they get without, whoever asks beside and whatever ends an answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from krasis.formats.errors import UsageError
from krasis.runtime import EngineSettings, SamplingSettings
from krasis.runtime.cpu.draft import CpuDraft
from krasis.runtime.serving.api import Delta, Finished, Request, Ticket
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import OpenedCore, open_core
from krasis.runtime.serving.steps import Limits
from tests.support.tiny_drafting import Told, converted, made_sure, tiny_drafting

FAMILIES = ("qwen3_next", "glm4_moe", "deepseek_v3")
TWO = ("qwen3_next", "glm4_moe")  # with matrices that each token overwrites, and with keys and values alone
PROMPT = np.random.default_rng(8).integers(0, 256, 45).tolist()
OTHER = np.random.default_rng(9).integers(0, 256, 130).tolist()
KINDS = {"greedy": SamplingSettings(), "drawn": SamplingSettings(temperature=1.2, top_p=0.95, seed=5)}
EAGER = Limits(pass_rows=512, company_s=0.0, between_s=0.0, decode_share=0.0)
Drive = Callable[[OpenedCore], Any]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {one: converted(tiny_drafting(one, tmp_path_factory.mktemp(one) / "hf")) for one in FAMILIES}


@contextmanager
def opened(bundle: Path, draft: int | None, **core: Any) -> Iterator[OpenedCore]:
    engine = EngineSettings(context=256, threads=1, prefault=False, device="cpu", draft=draft)
    with open_core(bundle, engine, CoreSettings(**{"num_slots": 2, "limits": EAGER, **core})) as found:
        yield found


def request(prompt: Sequence[int] = PROMPT, **changes: Any) -> Request:
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 20, "ignore_ends": True, "is_plain": True}
    return Request(id="r", progress=False, **(asked | changes))


def finish(core: OpenedCore) -> None:
    while core.core.turn(wait=False):
        pass


def said(ticket: Ticket) -> list[Any]:
    """What a client sees, but for times and what was guessed."""
    found: list[Any] = []
    for event in ticket.events(timeout_s=1):
        if isinstance(event, Delta):
            found.append((event.tokens, event.text, event.scores))
        else:
            assert isinstance(event, Finished), event
            found.append((event.reason, event.stop, replace(event.usage, num_drafted=0, num_accepted=0)))
    return found


def tokens_of(events: list[Any]) -> list[int]:
    return [token for event in events[:-1] for token in event[0]]


def answer(core: OpenedCore, asked: Request) -> list[Any]:
    ticket = core.core.submit(asked)
    finish(core)
    return said(ticket)


def drafted(core: OpenedCore) -> tuple[int, int]:
    counters = core.core.status().counters
    return counters.num_drafted, counters.num_accepted


def backend_of(core: OpenedCore) -> Any:
    return core.core._backend


class ToldAll:
    """``Told`` of several texts, of which one begins with what is held; wrong: every so many-th guess."""

    def __init__(self, texts: Sequence[Sequence[int]], count: int, wrong: int) -> None:
        self.told = [Told(text, count, wrong) for text in texts]
        self.count = count

    def propose(self, held: Sequence[int], token: int, count: int, slot: int = 0) -> list[int]:
        text = [*held, token]
        found = (one for one in self.told if one.text[: len(text)] == text)
        return next(found).propose(held, token, count)

    def follow(self, batch: object, hidden: object, *, computes: bool = True) -> None:
        pass

    def forget(self, slot: int = 0) -> None:
        pass


def alike(bundle: Path, drive: Drive, texts: Sequence[Sequence[int]], **core: Any) -> list[tuple[int, int]]:
    """drive gives the same with no guesses, with the layer's, with right ones, and with some that are wrong;
    (guessed, taken) of the last three."""
    with opened(bundle, 0, **core) as plain:
        expected = drive(plain)
        assert drafted(plain) == (0, 0)
    counts = []
    for wrong in (None, 0, 2):
        with opened(bundle, 2, **core) as one:
            if wrong is None:
                assert isinstance(backend_of(one).drafter, CpuDraft)
            else:
                backend_of(one).drafter = ToldAll(texts, 3, wrong)
            assert drive(one) == expected
            counts.append(drafted(one))
    return counts


@pytest.fixture(scope="module")
def texts(bundles: dict[str, Path]) -> dict[str, dict[str, list[int]]]:
    """Prompts with long answers, by family and kind."""
    found: dict[str, dict[str, list[int]]] = {}
    for family, bundle in bundles.items():
        with opened(bundle, 0) as plain:
            found[family] = {
                kind: [*PROMPT, *tokens_of(answer(plain, request(sampling=one, max_tokens=40)))]
                for kind, one in KINDS.items()
            }
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_scores_and_usage_are_what_they_are_without(
    bundles: dict[str, Path], texts: dict[str, dict[str, list[int]]], family: str, kind: str, tmp_path: Path
) -> None:
    """And the slot that is left: its file, and what goes on from it."""
    files: set[bytes] = set()

    def drive(core: OpenedCore) -> list[Any]:
        first = answer(core, request(sampling=KINDS[kind], logprobs=2, sampled_logprobs=kind == "drawn"))
        core.slots.folder = tmp_path
        saved = core.slots.save(0, "one.kv")
        finish(core)
        core.core.turn(wait=False)
        saved.result(1)
        files.add((tmp_path / "one.kv").read_bytes())
        longer = [*PROMPT, *tokens_of(first), 3, 1, 4]
        again = [answer(core, request(prompt, max_tokens=4)) for prompt in (longer, [*PROMPT, 5, 6])]
        return [first, again]

    whole = texts[family][kind]
    counts = alike(bundles[family], drive, [whole, *with_ends(bundles[family], whole)])
    assert len(files) == 1
    (layers, _), (right, taken), (guessed, fewer) = counts
    assert layers > 0
    assert right == taken >= 15
    assert 0 < fewer < guessed


def with_ends(bundle: Path, whole: list[int]) -> list[list[int]]:
    """The texts of what goes on from an answer of 20 tokens."""
    found = []
    with opened(bundle, 0) as plain:
        for prompt in ([*whole[:65], 3, 1, 4], [*PROMPT, 5, 6]):
            found += [[*prompt, *tokens_of(answer(plain, request(prompt)))]]
    return found


class Alternating:
    """A grammar of two kinds of tokens, in turn. cancels: what is cancelled at the eighth token."""

    def __init__(self, cancels: list[Ticket]) -> None:
        self.num, self.cancels = 0, cancels

    def allowed(self) -> npt.NDArray[np.bool_]:
        return np.arange(1024) % 2 == self.num % 2

    def accept(self, token: int) -> None:
        assert token % 2 == self.num % 2
        self.num += 1
        for ticket in self.cancels if self.num == 8 else []:
            ticket.cancel()


@pytest.mark.parametrize("family", TWO)
@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_and_a_cancellation_see_no_guess(bundles: dict[str, Path], family: str, kind: str) -> None:
    for is_cancelled in (False, True):

        def drive(core: OpenedCore, is_cancelled: bool = is_cancelled) -> list[Any]:
            tickets: list[Ticket] = []
            mask = Alternating(tickets if is_cancelled else [])
            tickets.append(core.core.submit(request(sampling=KINDS[kind], make_mask=lambda: mask)))
            finish(core)
            return [said(tickets[0]), core.core.status().slots[0].num_tokens, mask.num]

        with opened(bundles[family], 0) as plain:
            found = drive(plain)
        whole = [*PROMPT, *tokens_of(found[0])]
        assert (found[0][-1][0], found[2]) == (("cancelled", 8) if is_cancelled else ("length", 20))
        _, (right, taken), _ = alike(bundles[family], drive, [whole + [0] * 9])
        assert taken >= (5 if is_cancelled else 14)
        assert right >= taken


@pytest.mark.parametrize("family", TWO)
def test_a_stop_text_across_guesses(bundles: dict[str, Path], family: str) -> None:
    bundle, sampling = bundles[family], KINDS["drawn"]
    with opened(bundle, 0) as plain:
        tokenizer = plain.text.tokenizer
        letters = [one for one in range(256) if tokenizer.decode([one]).isalnum()]
        asked = request(sampling=sampling, logit_bias=dict.fromkeys(letters, 1e4))
        events = answer(plain, asked)
    whole, text = [*PROMPT, *tokens_of(events)], "".join(text for _, text, _ in events[:-1])
    assert len(text) >= 20
    for at in (4, 7, 12):

        def drive(core: OpenedCore, stop: str = text[at : at + 3]) -> list[Any]:
            first = answer(core, replace(asked, stops=(stop,)))
            assert (first[-1][0], first[-1][1]) == ("stop", stop)
            return [first, core.core.status().slots[0].num_tokens]

        alike(bundle, drive, [whole])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_request_and_prefixes_that_are_kept(
    bundles: dict[str, Path], texts: dict[str, dict[str, list[int]]], family: str
) -> None:
    bundle = bundles[family]
    with opened(bundle, 0) as plain:
        other = [*OTHER, *tokens_of(answer(plain, request(OTHER, max_tokens=40)))]
    whole = texts[family]["greedy"]

    def company(core: OpenedCore) -> list[Any]:
        first = core.core.submit(request(max_tokens=40))
        while core.core.status().slots[0].num_tokens < len(PROMPT) + 4:
            core.core.turn(wait=False)
        second = core.core.submit(request(OTHER, max_tokens=6))
        finish(core)
        return [said(first), said(second)]

    counts = alike(bundle, company, [whole, other])
    assert all(0 < taken <= guessed for guessed, taken in counts[1:])

    def restored(core: OpenedCore) -> list[Any]:
        asked = (PROMPT, OTHER, whole[:60], other[:140], PROMPT)
        return [answer(core, request(prompt, max_tokens=9)) for prompt in asked]

    alike(bundle, restored, [whole, other], num_slots=1, cache_bytes=10**8)


@pytest.mark.parametrize("family", TWO)
def test_no_guesses_in_company(bundles: dict[str, Path], family: str) -> None:
    """While two decode, and between the layers of a prompt; alone again, the layer guesses as one that has
    seen all of the text."""
    with opened(bundles[family], 2) as core:
        backend, batches, ticks = backend_of(core), list[list[int]](), itertools.count()
        core.core._clock = lambda: 0.5 * next(ticks)  # steps between layers are due at once
        run = backend.run

        def noted(batch: Any) -> Any:
            batches.append([span.rows for span in batch.spans])
            return run(batch)

        backend.run = noted
        first = core.core.submit(request(max_tokens=100))
        second = core.core.submit(request(OTHER[:20], max_tokens=40))
        while core.core.status().counters.num_finished.get("length", 0) < 1:
            core.core.turn(wait=False)
        assert len(batches) > 30
        assert all(len(rows) == 2 for rows in batches[-20:-1])
        assert all(rows == [1, 1] for rows in batches[-20:-1])
        followed = backend.drafter._followed[0]
        assert (followed.base, followed.end - followed.done <= 18) == (0, True)
        third = core.core.submit(request(OTHER[::-1], max_tokens=1))
        num_before = len(batches)
        finish(core)
        between = batches[num_before:]
        at = next(n for n, rows in enumerate(between) if max(rows) > 100)
        assert between[at + 1] == [1]
        assert any(len(rows) == 1 and rows[0] > 1 for rows in between[at + 2 :])
        for ticket in (first, second, third):
            assert said(ticket)[-1][0] == "length"


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(made_sure(tiny_drafting("qwen3_5_moe", tmp_path_factory.mktemp("sure") / "hf")))


def test_krasis_serve_counts_what_it_guesses(sure: Path) -> None:
    from tests.e2e.test_serve_engine import ask, served

    body = {"prompt": "abc", "temperature": 0, "max_tokens": 21, "ignore_eos": True, "n_predict": 21}
    replies = {}
    for draft in ("0", "3"):
        with served(sure, "--device", "cpu", "--ctx", "128", "--threads", "1", "--draft", draft) as (_, port):
            begin = time.monotonic()
            status, replies[draft], _ = ask(port, "POST", "/completion", body)
            assert status == 200, (replies[draft], time.monotonic() - begin)
            metrics = ask(port, "GET", "/metrics")[1]
        for name, count in (("drafts", 5), ("draft_tokens", 15), ("accepted_tokens", 15)):
            value = float(count if draft == "3" else 0)
            assert f"krasis_spec_decode_num_{name}_total {value}" in metrics
            assert f"llamacpp:spec_decode_num_{name}_total {value}" in metrics
    assert replies["0"]["content"] == replies["3"]["content"]
    assert "draft_n" not in replies["0"]["timings"]
    timings = replies["3"]["timings"]
    assert (timings["draft_n"], timings["draft_n_accepted"], timings["predicted_n"]) == (15, 15, 21)


def test_what_cannot_be_had_is_refused(sure: Path) -> None:
    from click.testing import CliRunner

    from krasis.runtime.server.command import main as krasis_serve

    told = CliRunner().invoke(krasis_serve, [str(sure), "--draft", "1", "--gpus", "2"])
    assert told.exit_code == 2
    assert "guessing ahead (--draft) is for the CPU in this version" in told.output
    told = CliRunner().invoke(krasis_serve, [str(sure), "--draft", "9"])
    assert told.exit_code == 2
    assert "draft is out of range" in told.output
    engine = EngineSettings(context=64, device="cpu", draft=1, activations="float32")
    with pytest.raises(UsageError, match="only the int8 kernels guess"):
        open_core(sure, engine)
