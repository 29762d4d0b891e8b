"""Drafting with the layer for multi-token prediction: its logits are transformers', and text is what it is
without, whether guesses are right or wrong, at a temperature or none, across saved prefixes and turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.runtime import Engine, EngineSettings, SamplingSettings
from krasis.runtime.cli.run import main as krasis_run
from krasis.runtime.cpu.draft import CpuDraft, draft_spec
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from tests.support.random_weights import dequantised_state, write_checkpoint
from tests.support.tiny_drafting import Told, converted, made_sure, tiny_drafting

FAMILIES = ("qwen3_next", "qwen3_5_moe", "glm4_moe", "deepseek_v3")
PROMPT = np.random.default_rng(8).integers(0, 256, 45).tolist()
NUM_TOKENS = 20
TWO = ("qwen3_next", "glm4_moe")  # with matrices that each token overwrites, and with keys and values alone
KINDS = {"greedy": SamplingSettings(), "drawn": SamplingSettings(temperature=1.2, top_p=0.95, seed=5)}
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_drafting(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return converted(checkpoint)


def open_engine(bundle: Path, **changes: Any) -> Engine:
    settings: dict[str, Any] = {"context": 256, "threads": 1, "prefault": False, "device": "cpu", "draft": 0}
    return Engine.open(bundle, EngineSettings(**(settings | changes)))


def text_of(engine: Engine, kind: str, prompt: Sequence[int] = PROMPT) -> list[int]:
    answer = engine.generate(list(prompt), KINDS[kind], max_tokens=NUM_TOKENS)
    for _ in answer:
        pass
    return answer.stats.tokens


def count_passes(engine: Engine) -> list[int]:
    """The rows of each pass from now on that is none of a prompt."""
    backend, rows = engine._held.backend, list[int]()
    run = backend.run

    def counted(batch: Any) -> Any:
        if batch.spans[0].start >= len(PROMPT):
            rows.append(len(batch.tokens))
        return run(batch)

    backend.run = counted  # type: ignore[method-assign]
    return rows


# ---- the layer -------------------------------------------------------------------------------------------


class Oracle:
    """transformers' model and its layer for multi-token prediction on a bundle's dequantised weights."""

    def __init__(self, weights: ModelWeights, config: dict[str, Any], folder: Path) -> None:
        import torch
        import transformers
        from transformers.modeling_layers import MtpLayer

        draft = weights.draft
        assert draft is not None
        name = config["architectures"][0]
        of = getattr(transformers, name)
        model = of.from_pretrained(
            write_checkpoint(dequantised_state(weights), config, folder / "main"), attn_implementation="eager"
        )
        spec = draft_spec(weights.spec, draft)
        alone = replace(weights, spec=spec, layers=(replace(draft, layer=spec.layers[0]),), draft=None)
        one = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}
        one |= {"mlp_layer_types": ["sparse"]}
        only = {key: value for key, value in one.items() if key in config}
        single = of.from_pretrained(
            write_checkpoint(dequantised_state(alone), config | only, folder / "draft"),
            attn_implementation="eager",
        )
        block, norm = single.model.layers[0], type(model.model.norm)
        self.layer = MtpLayer(single.config, lambda *_: block, norm, 0)
        offset = float(weights.spec.family in ("qwen3_next", "qwen3_5_moe"))
        for ours, theirs in (("embedding_norm", "enorm"), ("hidden_norm", "hnorm"), ("norm", "post_norm")):
            values = torch.tensor(draft.vector(f"draft.{ours}") - np.float32(offset))
            getattr(self.layer, theirs).weight.data = values
        from krasis.formats.layouts import Int8RowsLayout

        projection = draft.int8("draft.projection")
        values = Int8RowsLayout().unpack(projection.codes, projection.scales)
        self.layer.eh_proj.weight.data = torch.tensor(values)
        self.model = model.eval()

    def hidden(self, tokens: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states[-1]

    def draft(self, hidden: Any, tokens: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Logits [n, vocab] and what the layer hands on, of hidden states [1, n, hidden] and the tokens that
        follow theirs."""
        import torch

        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(torch.tensor([list(tokens)]))
            places = torch.arange(len(tokens))[None]
            mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
            out = self.layer(
                embedded,
                hidden,
                position_embeddings=self.model.model.rotary_emb(embedded, places),
                attention_mask=mask,
                position_ids=places,
                cache=None,
            )
            return self.model.lm_head(out)[0].numpy(), out


def test_its_logits_are_transformers(checkpoint: Path, bundle: Path, relative_error: RelativeError) -> None:
    import torch

    config = json.loads((checkpoint / "config.json").read_text("utf-8")) | {"num_nextn_predict_layers": 0}
    with Bundle.open(bundle) as opened:
        oracle = Oracle(load_weights(opened, "cpu", draft=True), config, bundle.parent)
    hidden = oracle.hidden(PROMPT)
    expected, _ = oracle.draft(hidden[:, :-1], PROMPT[1:])
    with open_engine(bundle, draft=2, prefill_chunk=16) as engine:
        drafter = engine._held.backend.drafter
        assert isinstance(drafter, CpuDraft)
        engine.prefill(PROMPT[:30])  # 16 rows, and 14
        errors = []
        for at in range(30, 44):
            guesses = drafter.propose(PROMPT[:at], PROMPT[at], 1)
            found = drafter.logits[0, : opened.spec.vocab]
            errors.append(relative_error(found, expected[at - 1]))
            assert len(guesses) == 1
            engine.decode(PROMPT[at])
        # Rounding may choose another expert of two that are as good, in a position or two.
        assert np.median(errors) < 2e-2
        assert sorted(errors)[-3] < 3e-2
        two = drafter.propose(PROMPT[:44], PROMPT[44], 2)
        found = drafter.logits[0, : opened.spec.vocab]
    # The second guess is made of what the layer handed on with the first.
    logits, handed = oracle.draft(hidden[:, :44], PROMPT[1:45])
    assert two[0] == int(np.argmax(logits[-1]))
    chained = torch.cat([hidden[:, :44], handed[:, -1:]], dim=1)
    logits, _ = oracle.draft(chained, [*PROMPT[1:45], two[0]])
    assert relative_error(found, logits[-1]) < 4e-2


# ---- text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(bundle: Path) -> dict[str, list[int]]:
    with open_engine(bundle) as engine:
        return {kind: text_of(engine, kind) for kind in KINDS}


@pytest.mark.parametrize("checkpoint", [*TWO, "deepseek_v3"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_it_is_without(bundle: Path, plain: dict[str, list[int]], kind: str) -> None:
    with open_engine(bundle, draft=2) as engine:
        rows = count_passes(engine)
        answer = engine.generate(PROMPT, KINDS[kind], max_tokens=NUM_TOKENS)
        for _ in answer:
            pass
        assert answer.stats.tokens == plain[kind]
        drafts = answer.stats.drafts
        assert drafts.num_drafted > 0
        assert sum(rows) == len(rows) + drafts.num_drafted
        assert len(rows) == len(plain[kind]) - 1 - drafts.num_accepted
        assert len(engine.tokens) == len(PROMPT) + len(plain[kind]) - 1


@pytest.mark.parametrize("checkpoint", TWO, indirect=True, scope="module")
@pytest.mark.parametrize(("count", "wrong"), [(1, 0), (1, 1), (3, 2)])
def test_right_and_wrong_guesses(bundle: Path, plain: dict[str, list[int]], count: int, wrong: int) -> None:
    with open_engine(bundle, draft=1) as engine:
        for kind in KINDS:
            told = Told([*PROMPT, *plain[kind]], count, wrong)
            engine.reset()
            engine._held.backend.drafter = told
            rows = count_passes(engine)
            assert text_of(engine, kind) == plain[kind]
            steps = len(plain[kind]) - 1
            if not wrong:
                assert len(rows) == -(-steps // (1 + count))
            elif wrong == 1:
                assert len(rows) == steps


@pytest.mark.parametrize("checkpoint", TWO, indirect=True, scope="module")
def test_what_is_held_afterwards_is_the_same(
    bundle: Path, plain: dict[str, list[int]], tmp_path: Path
) -> None:
    """Behind guesses that were wrong: a further turn, tokens taken back, a saved prefix."""
    more = [3, 1, 4, 1, 5]
    with open_engine(bundle) as engine:
        text = text_of(engine, "greedy")
        engine.save_prefix(tmp_path / "plain.kv")
        expected = engine.prefill(more)
        engine.truncate(len(engine.tokens) - 3)
        held = engine.tokens
        again = engine.prefill(more)
    for wrong in (1, 2):
        with open_engine(bundle, draft=2) as engine:
            engine._held.backend.drafter = Told([*PROMPT, *text], 2, wrong)
            assert text_of(engine, "greedy") == text
            engine.save_prefix(tmp_path / "drafted.kv")
            assert (tmp_path / "drafted.kv").read_bytes() == (tmp_path / "plain.kv").read_bytes()
            np.testing.assert_array_equal(engine.prefill(more), expected)
            engine.truncate(len(engine.tokens) - 3)
            assert engine.tokens == held
            np.testing.assert_array_equal(engine.prefill(more), again)
    with open_engine(bundle, draft=2) as engine:  # its own layer, which has seen none of the prefix
        engine.load_prefix(tmp_path / "plain.kv")
        np.testing.assert_array_equal(engine.prefill(more), expected)
        engine.load_prefix(tmp_path / "plain.kv")
        whole = [*PROMPT, *text[:-1], *more]
        found = text_of(engine, "greedy", whole)
    with open_engine(bundle) as engine:
        assert found == text_of(engine, "greedy", whole)


@pytest.mark.parametrize("checkpoint", TWO, indirect=True, scope="module")
def test_up_to_the_end_of_the_context(bundle: Path, plain: dict[str, list[int]]) -> None:
    for context in (len(PROMPT) + 1, len(PROMPT) + 6):
        with open_engine(bundle, draft=3, context=context, prefill_chunk=2) as engine:
            found = text_of(engine, "greedy")
            assert found == plain["greedy"][: context - len(PROMPT) + 1]


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(made_sure(tiny_drafting("qwen3_5_moe", tmp_path_factory.mktemp("sure") / "hf")))


def test_a_layer_that_knows_halves_the_passes(sure: Path) -> None:
    arguments = [str(sure), "--raw", "--prompt", "abc", "--max-tokens", "21", "--temperature", "0", "--json"]
    arguments += ["--device", "cpu", "--ctx", "128", "--threads", "1"]
    found = {}
    for draft in ("0", "1", "3"):
        done = CliRunner().invoke(krasis_run, [*arguments, "--draft", draft], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found[draft] = json.loads(done.stdout)
    counts = {
        draft: (record["num_drafted_tokens"], record["num_accepted_tokens"])
        for draft, record in found.items()
    }
    assert counts == {"0": (0, 0), "1": (10, 10), "3": (15, 15)}
    assert len({tuple(record["tokens"]) for record in found.values()}) == 1
    text = CliRunner().invoke(krasis_run, [*arguments[:-7], "--draft", "1"], catch_exceptions=False)
    assert "guesses right)" in text.stderr


def test_what_cannot_be_had_is_refused(sure: Path) -> None:
    plain = sure.parent / "plain.krasis"
    source = [str(sure.parent / "hf"), "-o", str(plain), "--tiers", "cpu", "--quiet", "--force-text"]
    assert CliRunner().invoke(convert, [*source, "--force-weights"]).exit_code == 0
    with pytest.raises(UsageError, match=r"no layer that guesses tokens.*--mtp"):
        open_engine(plain, draft=1)
    with pytest.raises(UsageError, match="only the int8 kernels guess"):
        open_engine(sure, draft=1, activations="float32")
    with pytest.raises(UsageError, match="draft is out of range"):
        open_engine(sure, draft=9)
    run = CliRunner().invoke(krasis_run, [str(sure), "--prompt", "a", "--draft", "1", "--gpus", "2"])
    assert run.exit_code == 2
    assert "guessing ahead (--draft) is for the CPU in this version" in run.stderr
    with open_engine(plain, draft=None) as engine:
        assert engine.settings.draft is None
