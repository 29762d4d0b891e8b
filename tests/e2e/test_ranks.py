"""A model on 1, 2, 3 and 4 ranks: the logits of one, also after tokens that rank 0 decoded alone.

Devices are doubles, which raise on any access that is not ordered; ranks talk through Gloo. Partial sums are
exchanged in f32, so logits agree to TOLERANCE of their norm (measured 4e-4), and greedy tokens exactly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rank_runs import computed_once, needs_double, vram_bytes

from krasis.runtime.cli.run import main

pytest.importorskip("torch.distributed")

HERE = Path(__file__).parent
pytestmark = needs_double
TOLERANCE = 1e-3
SIZES = (1, 2, 3, 4)
CHECK = 0
# 128 experts: 3 ranks have 43, 43 and 42 of them, streamed in groups of 8; decode is rank 0's, on its CPU.
# 5 experts on 4 ranks: 2, 1, 1, 1, all resident; no CPU experts: the ranks decode together.
SHAPES = {
    "128 experts": {"num_experts": 128, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    "5 experts": {"num_experts": 5, "moe_intermediate_size": 64, "num_hidden_layers": 3},
}
STREAMED = {"128 experts": True, "5 experts": False}
TIERS = {"128 experts": ("gpu", "cpu"), "5 experts": ("gpu",)}


@pytest.fixture(scope="module")
def bundles(make_bundle, make_config) -> dict[str, Path]:
    common = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    return {
        name: make_bundle(make_config(**common, **shape), seed=3, gpu_group=64, tiers=TIERS[name])
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def outcomes(bundles, tmp_path_factory):
    """What ``ranks_script.py`` computed, by shape and number of ranks."""
    sizes = (*SIZES, CHECK)
    plan = [
        (
            str(bundle),
            [(size, vram_bytes(bundle, max(size, 1)) if STREAMED[name] else None) for size in sizes],
        )
        for name, bundle in bundles.items()
    ]
    folder = computed_once(tmp_path_factory, "ranks", plan)
    return {
        (name, size): dict(np.load(folder / str(index) / f"{size}.npz"))
        for index, name in enumerate(bundles)
        for size in sizes
    }


@pytest.mark.parametrize("num_ranks", SIZES[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_one_rank(outcomes, relative_error, shape: str, num_ranks: int) -> None:
    one, several = outcomes[shape, 1], outcomes[shape, num_ranks]
    assert several["placement"][0].startswith(f"{num_ranks} ranks: GPU")
    for name in ("logits_1", "logits_2", "logits_3", "logits_9"):
        assert relative_error(several[name], one[name]) < TOLERANCE, name


@pytest.mark.parametrize("num_ranks", SIZES[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation(outcomes, relative_error, shape: str, num_ranks: int) -> None:
    """Decode on all ranks or on rank 0, a second turn, an edited turn."""
    one, several = outcomes[shape, 1], outcomes[shape, num_ranks]
    np.testing.assert_array_equal(several["greedy"], one["greedy"])
    is_joint = not STREAMED[shape]
    words = f"ranks of this host: {num_ranks} GPUs + all experts resident" if is_joint else "rank 0: "
    assert str(several["placement"][2]).startswith(words)
    for name in ("decoded_0", "decoded_1", "decoded_2", "decoded_3", "second_turn", "edited_turn"):
        assert relative_error(several[name], one[name]) < TOLERANCE, name


@pytest.mark.parametrize("num_ranks", SIZES)
def test_experts_are_streamed_in_groups(outcomes, num_ranks: int) -> None:
    """ceil(ceil(128 / R) / 8) groups."""
    groups = {1: 16, 2: 8, 3: 6, 4: 4}[num_ranks]
    assert f" {groups} groups a layer" in str(outcomes["128 experts", num_ranks]["placement"][1])
    assert " 0 groups a layer" in str(outcomes["5 experts", num_ranks]["placement"][1])


@pytest.mark.parametrize("num_ranks", SIZES[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_ranks_get_what_rank_0_decoded(outcomes, relative_error, shape: str, num_ranks: int) -> None:
    """Turns after decoded tokens, against one rank that goes on from the same keys and values."""
    several, expected = outcomes[shape, num_ranks], outcomes[shape, CHECK]
    for name in ("second_turn", "edited_turn"):
        assert relative_error(several[name], expected[f"{name}_{num_ranks}"]) < TOLERANCE, name


@pytest.mark.parametrize("num_ranks", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_ranks_get_what_rank_0_loaded(outcomes, relative_error, shape: str, num_ranks: int) -> None:
    found, expected = outcomes[shape, num_ranks]["loaded_turn"], outcomes[shape, 1]["second_turn"]
    assert relative_error(found, expected) < TOLERANCE


def test_ranks_round_differently(outcomes) -> None:
    """Equal bits would mean that the ranks did not share the work."""
    one, three = outcomes["128 experts", 1], outcomes["128 experts", 3]
    assert (one["logits_9"] != three["logits_9"]).any()


def test_logits_of_transformers(bundles, outcomes, reference_logits, relative_error) -> None:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.cpu.weights import load_weights

    with Bundle.open(bundles["5 experts"]) as bundle:
        expected = reference_logits(load_weights(bundle, "gpu"), list(range(1, 10)))
    assert relative_error(outcomes["5 experts", 3]["logits_9"], expected) < 5e-3


# ---- processes
# -----------------------------------------------------------------------------------------------


def start_session(bundle: Path, *arguments: object) -> subprocess.Popen[str]:
    """An engine on 3 ranks that ``--gpus`` started; says "ready PID PID" on a line, then obeys lines."""
    command = [sys.executable, HERE / "ranks_script.py", "session", bundle, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(session: subprocess.Popen[str]) -> list[int]:
    words = session.stdout.readline().split()
    assert words[0] == "ready", session.stderr.read()
    return [int(word) for word in words[1:]]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def test_ctrl_c_keeps_the_ranks_in_step_and_a_killed_worker_ends_the_job(bundles) -> None:
    """Ctrl-C reaches all processes of a terminal: rank 0 finishes the pass, the others take no notice."""
    with start_session(bundles["5 experts"]) as session:
        pids = workers_of(session)
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        for line, answer in (("interrupted", "KeyboardInterrupt"), ("prefill", "done")):
            session.stdin.write(f"{line}\n")
            session.stdin.flush()
            assert session.stdout.readline().strip() == answer
        os.kill(pids[1], signal.SIGKILL)
        begin = time.monotonic()
        out, errors = session.communicate("prefill\n", timeout=60)
        assert time.monotonic() - begin < 20
        assert out.strip() == "RankError: rank 2 ended: killed by SIGKILL", errors
        assert session.returncode == 8
    wait_until_gone(pids)


def test_ctrl_c_in_decode_waits_for_the_token_and_a_killed_worker_ends_it(bundles) -> None:
    """Rank 0's GPU waits for the lost one's experts, which must not take its 20 s."""
    with start_session(bundles["5 experts"]) as session:
        pids = workers_of(session)
        session.stdin.write("decoding\n")
        session.stdin.flush()
        assert session.stdout.readline().strip() == "decodes"
        session.send_signal(signal.SIGINT)
        assert session.stdout.readline().strip() == "KeyboardInterrupt"
        session.stdin.write("decoding\n")
        session.stdin.flush()
        assert session.stdout.readline().strip() == "decodes"
        os.kill(pids[0], signal.SIGKILL)
        begin = time.monotonic()
        out, errors = session.communicate(timeout=60)
        assert time.monotonic() - begin < 15
        assert out.strip() == "RankError: rank 1 ended: killed by SIGKILL", errors
        assert session.returncode == 8
    wait_until_gone(pids)


def test_no_worker_outlives_rank_0(bundles) -> None:
    with start_session(bundles["5 experts"]) as session:
        pids = workers_of(session)
        session.kill()
        wait_until_gone(pids)


def krasis_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"
    command = [sys.executable, "-c", code, "--device", "double", *map(str, arguments)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


def test_krasis_run_on_two_ranks_says_what_one_says(make_bundle, make_config, tokenizer_json) -> None:
    bundle = make_bundle(
        make_config(moe_intermediate_size=64), tokenizer=tokenizer_json, gpu_group=64, tiers=("gpu",)
    )
    said = ["--raw", "--prompt", "import os", "--temperature", "0", "--max-tokens", "4", "--ctx", "64"]
    one = CliRunner().invoke(main, [str(bundle), "--device", "double", *said], prog_name="krasis-run")
    two = krasis_run(bundle, *said, "--gpus", "2", "-v")
    assert one.exit_code == 0, one.output
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.stdout != ""
    assert "[rank 1] krasis.runtime.distributed.job: rank 1 of 2: experts" in two.stderr


def test_other_ranks_are_started_before_torch_is_imported(bundles) -> None:
    """The import takes all of them as long: side by side, not one after the other."""
    code = (
        "import sys; from krasis.runtime.distributed import launch;"
        "from krasis.runtime.settings import EngineSettings;"
        "launch.Workers = lambda *_: sys.exit('torch' in sys.modules and 'after torch' or 'before');"
        "launch.open_engine(sys.argv[1], EngineSettings(device='double'), 2)"
    )
    command = [sys.executable, "-c", code, str(bundles["5 experts"])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "before"


def test_krasis_run_refuses_more_ranks_than_experts(bundles) -> None:
    bundle = bundles["5 experts"]
    bundle = bundles["5 experts"]
    done = krasis_run(bundle, "--gpus", "6", "--raw", "--prompt", "x")
    assert "more ranks than experts (got 6; limit 5)" in done.stderr
    assert done.returncode == 2
