"""krasis-run as people and programs use it: prompts, pipes, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from krasis.runtime import Engine, EngineSettings, SamplingSettings
from krasis.runtime.cli.run import main
from tests.support.patience import PATIENCE_S

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
GREEDY = ["--temperature", "0", "--max-tokens", "12", "--ctx", "256", "--threads", "2"]


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], input=stdin, prog_name="krasis-run")


def expected_text(bundle: Path, prompt: Any, num_tokens: int = 12) -> str:
    """What the library says; ``test_the_library_and_transformers_agree`` ties that to transformers."""
    with Engine.open(bundle, EngineSettings(context=256, threads=2)) as engine:
        answer = engine.generate(prompt, SamplingSettings(), max_tokens=num_tokens)
        return "".join(piece.text for piece in answer)


def test_the_library_and_transformers_agree(
    trained_bundle: Path, reference_logits: Callable[..., Any]
) -> None:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.cpu.weights import load_weights

    with Engine.open(trained_bundle, EngineSettings(threads=2)) as engine:
        answer = engine.generate("import os\nimport ", SamplingSettings(), max_tokens=8)
        text = "".join(piece.text for piece in answer)
        ids = engine.encode("import os\nimport ")
    with Bundle.open(trained_bundle) as opened:
        weights = load_weights(opened, "cpu")
    said = answer.stats.tokens
    rows = reference_logits(weights, ids + said[:-1])[len(ids) - 1 :]
    for token, logits in zip(said, rows, strict=True):
        # Greedy: the most likely, or as good as it within what int8 activations may change.
        assert logits.max() - logits[token] < 0.05 * logits.std()
    assert text.strip()


def test_a_prompt_is_answered_through_the_chat_template(chat_bundle: Path) -> None:
    result = run(chat_bundle, "--prompt", "hello", "--system", "be brief", *GREEDY)
    assert result.exit_code == 0, result.output
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert result.stdout.rstrip("\n") == expected_text(chat_bundle, messages).rstrip("\n")
    summary = result.stderr.strip().splitlines()[-1]
    for word in ("load", "prompt", "tok/s", "answer 12 tokens", "first token"):
        assert word in summary


@pytest.mark.parametrize("how", ["option", "file", "pipe", "dash"])
def test_raw_text_comes_from_anywhere(chat_bundle: Path, tmp_path: Path, how: str) -> None:
    text = "the quick Grüße"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    source = {
        "option": ["--prompt", text],
        "file": ["--file", str(tmp_path / "prompt.txt")],
        "pipe": [],
        "dash": ["--file", "-"],
    }[how]
    result = run(chat_bundle, "--raw", *source, *GREEDY, stdin=text if how in ("pipe", "dash") else None)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == expected_text(chat_bundle, text).rstrip("\n")


def test_json_has_text_counts_times_and_settings(chat_bundle: Path) -> None:
    result = run(chat_bundle, "--prompt", "hi", "--raw", "--json", *GREEDY, "--kv-dtype", "f32")
    report = json.loads(result.stdout)
    assert report["text"] == expected_text(chat_bundle, "hi")
    assert (report["num_tokens"], report["stop_reason"]) == (12, "length")
    assert report["num_prompt_tokens"] == len(expected_ids(chat_bundle, "hi"))
    assert report["decode_tokens_per_s"] > 0
    assert report["time_to_first_token_s"] >= report["prefill_s"] > 0
    assert report["settings"]["temperature"] == 0
    assert report["settings"]["kv_dtype"] == "f32"
    assert report["settings"]["context"] == report["settings"]["prefill_chunk"] == 256


def expected_ids(bundle: Path, text: str) -> list[int]:
    with Engine.open(bundle) as engine:
        return engine.encode(text)


def test_sampling_defaults_come_from_the_model_and_seeds_repeat(chat_bundle: Path) -> None:
    results = [
        json.loads(run(chat_bundle, "--prompt", "hi", "--json", "--seed", seed, "--max-tokens", "20").stdout)
        for seed in ("1", "1", "2")
    ]
    assert results[0]["settings"]["temperature"] == 0.6
    assert results[0]["settings"]["top_k"] == 20
    assert results[0]["tokens"] == results[1]["tokens"] != results[2]["tokens"]


def test_isa_threads_and_streaming_do_not_change_the_text(chat_bundle: Path) -> None:
    plain = run(chat_bundle, "--prompt", "hello", *GREEDY).stdout
    assert run(chat_bundle, "--prompt", "hello", *GREEDY, "--no-stream").stdout.rstrip("\n") == plain.rstrip(
        "\n"
    )
    assert run(chat_bundle, "--prompt", "hello", *GREEDY, "--threads", "1").stdout == plain
    assert run(chat_bundle, "--prompt", "hello", *GREEDY, "--isa", "avx2").exit_code == 0


def test_a_stop_string_ends_the_answer(chat_bundle: Path) -> None:
    whole = expected_text(chat_bundle, "hello", 60)
    stop = whole[20:23]
    result = json.loads(
        run(chat_bundle, "--raw", "--prompt", "hello", "--json", "--stop", stop, "--temperature", "0",
            "--ctx", "256", "--max-tokens", "60").stdout
    )  # fmt: skip
    assert (result["text"], result["stop_reason"]) == (whole[: whole.find(stop)], "stop")


def test_a_full_context_says_so(chat_bundle: Path) -> None:
    result = run(chat_bundle, "--prompt", "hello", "--temperature", "0", "--ctx", "40")
    assert result.exit_code == 0
    assert "context of 40 tokens is full" in result.stderr


def test_verbose_says_what_was_chosen(chat_bundle: Path) -> None:
    done = subprocess.run(
        [*RUN, str(chat_bundle), "--prompt", "hi", *GREEDY, "-v"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    isa = "amx_int8" if "amx_int8" in done.stderr else "avx"
    for word in ("threads", "cpu-q8-r32-b32", isa, "prefault", "GB/s"):
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere/model.krasis", "--prompt", "x"], 3, "there is no such bundle"),
        (["BUNDLE", "--prompt", ""], 2, "the prompt is empty"),
        (["BUNDLE", "--prompt", "x", "--file", "y"], 2, "y: the prompt cannot be read"),
        (["BUNDLE", "--file", "/nowhere/prompt"], 2, "cannot be read"),
        (["BUNDLE", "--prompt", "x", "--temperature", "-1"], 2, "temperature is out of range"),
        (["BUNDLE", "--prompt", "x", "--top-p", "nan"], 2, "top_p is out of range"),
        (["BUNDLE", "--prompt", "x", "--ctx", "99999999"], 2, "longer than the model allows"),
        (["BUNDLE", "--prompt", "x", "--ctx", "0"], 2, "context is out of range"),
        (["BUNDLE", "--prompt", "x", "--max-tokens", "0"], 2, "max_tokens must be positive"),
        (["BUNDLE", "--prompt", "x" * 3000, "--ctx", "64"], 2, "the context is full"),
        (["BUNDLE", "--prompt", "x", "--raw", "--system", "y"], 2, "--system needs the chat template"),
        (["BUNDLE", "--prompt", "x", "--experts", "gpu"], 2, "GPU experts cannot be run"),
        (["BUNDLE", "--prompt", "x", "--isa", "sse"], 2, "sse"),
    ],
)
def test_errors_are_one_line_and_have_the_code_of_their_class(
    chat_bundle: Path, arguments: list[str], code: int, words: str
) -> None:
    result = run(*[str(chat_bundle) if one == "BUNDLE" else one for one in arguments])
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if not result.stderr.startswith("Usage:"):
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stderr.startswith("krasis-run: ")


def test_bytes_that_are_no_text_are_refused(chat_bundle: Path) -> None:
    result = run(chat_bundle, "--raw", stdin=b"\xff\xfe\x00")
    assert (result.exit_code, "not UTF-8" in result.stderr) == (2, True)


def test_a_bundle_without_template_or_tokenizer_says_what_to_do(
    make_bundle: Callable[..., Path], make_config: Callable[..., Any], tokenizer_json: bytes
) -> None:
    result = run(make_bundle(make_config()), "--prompt", "x")
    assert result.exit_code == 4
    assert "no tokenizer.json" in result.stderr


def test_no_chat_template_points_to_raw(chat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krasis.runtime.text.assets.TextAssets._template_source", lambda self: None)
    result = run(chat_bundle, "--prompt", "x")
    assert result.exit_code == 2
    assert "--raw" in result.stderr
    assert run(chat_bundle, "--prompt", "x", "--raw", *GREEDY).exit_code == 0


def test_help_does_not_load_the_engine() -> None:
    code = (
        "import sys; from krasis.runtime.cli.run import main; main(['--help'], standalone_mode=False);"
        "heavy = {'numpy', 'torch', 'transformers', 'h5py', 'tokenizers', 'jinja2', 'prompt_toolkit'};"
        "heavy &= set(sys.modules);"
        "print('heavy', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "heavy []" in done.stdout


# What an answer on the CPU has no use for in this process. Templates and tokenizers are the worker's; each of
# the others takes 2 ms to 2 s to import.
NOT_FOR_THE_CPU = (
    *("torch", "transformers", "h5py", "gguf", "safetensors", "pandas", "prompt_toolkit"),
    *("jinja2", "tokenizers", "numpy.random", "fractions", "krasis.convert"),
    *("krasis.formats.bundle.writer", "krasis.formats.bundle.shard_plan", "krasis.formats.checkpoints.gguf"),
    *("krasis.formats.models.registry", "krasis.runtime.planning", "krasis.runtime.host_memory"),
    *("krasis.runtime.gpu.backend", "krasis.runtime.distributed.launch", "krasis.runtime.cli.terminal"),
)


def test_running_loads_nothing_that_it_has_no_use_for(chat_bundle: Path) -> None:
    arguments = [str(chat_bundle), "--prompt", "x", "--max-tokens", "3", "--temperature", "0"]
    code = (
        "import gc, sys; from krasis.runtime.cli.run import main;"
        f"main({arguments!r}, standalone_mode=False);"
        f"print('heavy', sorted(set({NOT_FOR_THE_CPU!r}) & set(sys.modules)), 'collects', gc.isenabled())"
    )
    assert "heavy [] collects True" in _printed(code)


def test_the_worker_starts_before_numpy_is_imported(chat_bundle: Path) -> None:
    """It takes as long to get ready as this process takes to import: on two cores neither waits."""
    code = (
        "import sys\n"
        "from krasis.runtime.text import sandbox\n"
        "from krasis.runtime.cli.run import main\n"
        "class Sandbox:\n"
        "    def start(self):\n"
        "        print('numpy' in sys.modules)\n"
        "        sys.exit()\n"
        "sandbox.shared_sandbox = Sandbox\n"
        f"main([{str(chat_bundle)!r}, '--prompt', 'x'])"
    )
    assert _printed(code).strip() == "False"


def _printed(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_ctrl_c_stops_a_one_shot_answer_and_keeps_what_was_said(chat_bundle: Path) -> None:
    command = [*RUN, str(chat_bundle), "--prompt", "hello", "--ctx", "32768", "--seed", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert b"tok/s" in stderr.splitlines()[-1]


def test_weights_are_taken_from_the_disk_anew(chat_bundle: Path) -> None:
    result = run(chat_bundle, "--prompt", "hi", "--raw", "--json", "--reread", *GREEDY)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["reread"] is True
    assert report["huge_page_share"] is None  # so few weights
    assert report["text"] == expected_text(chat_bundle, "hi")


def test_small_pages_are_told_on_request(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Engine, "huge_page_share", 0.04)
    result = run(chat_bundle, "--prompt", "hi", "--raw", *GREEDY)
    assert result.exit_code == 0, result.output
    assert "tok/s" in result.stderr.splitlines()[-1]
    assert "huge" not in result.stderr
    with caplog.at_level("INFO"):
        run(chat_bundle, "--prompt", "hi", "--raw", *GREEDY, "-v")
    advice = caplog.messages[-1]
    assert advice.startswith("4% of the weights lie in huge pages")
    assert "--reread" in advice
