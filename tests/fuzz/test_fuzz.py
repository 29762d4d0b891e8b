"""A short deterministic run of every parser's fuzzer; KRASIS_FUZZ_SECONDS=600 gives each ten minutes."""

import os
import random

import fuzzing
import pytest

from krasis.formats.errors import FormatError

SECONDS = float(os.environ.get("KRASIS_FUZZ_SECONDS", "0"))
SEED = 20261123
NUM_INPUTS = {"manifest": 6000, "safetensors": 20_000, "gguf": 10_000, "config": 10_000}
# Fewer kinds of refusal than this mean that the damage no longer reaches the parser's depths.
MIN_SENTENCES = {"manifest": 30, "safetensors": 22, "gguf": 35, "config": 12}


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_only_our_errors_escape(name):
    limits = {"seconds": SECONDS} if SECONDS else {"num_inputs": NUM_INPUTS[name]}
    seed = random.SystemRandom().randrange(1 << 32) if SECONDS else SEED
    result = fuzzing.run(fuzzing.TARGETS[name], seed=seed, **limits)
    assert [complaint for _, complaint in result.crashes] == [], (
        f"seed {seed}; tests/fuzz/run.py keeps such inputs"
    )
    assert len(result.sentences) >= MIN_SENTENCES[name], sorted(result.sentences)
    assert result.num_accepted > 0


@pytest.mark.parametrize("name", ["manifest", "safetensors", "gguf"])
def test_the_corpus_is_kept(name):
    assert len(fuzzing.corpus_of(name)) >= 15


def test_runs_are_deterministic():
    one, two = (fuzzing.run(fuzzing.TARGETS["gguf"], seed=7, num_inputs=300) for _ in range(2))
    assert one.sentences == two.sentences
    assert one.fresh == two.fresh


def test_the_fuzzer_finds_what_it_looks_for():
    """A parser with a bug, a memory hog, and one that complains in control characters."""

    def buggy(data):
        if b"\xff" in data:
            raise IndexError("list index out of range")

    def greedy(data):
        bytearray(20_000_000)

    class RudeError(FormatError):
        def __str__(self):  # ours escape what they say: one that forgets to
            return "\x1b[2J"

    def rude(data):
        raise RudeError("anything")

    for parse, complaint in ((buggy, "IndexError"), (greedy, "bytes allocated"), (rude, "unprintable")):
        base = fuzzing.TARGETS["gguf"]
        target = fuzzing.Target("none", parse, base.mutate, base.seeds)
        result = fuzzing.run(target, seed=1, num_inputs=40)
        assert complaint in result.crashes[0][1]
