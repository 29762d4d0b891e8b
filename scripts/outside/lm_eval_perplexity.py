#!/usr/bin/env python3
"""lm-evaluation-harness over HTTP against scripts/perplexity: rolling log likelihoods of a text, asked of
krasis-serve as `local-completions` (token ids, echo, logprobs), and the same windows through an engine.

    pip install 'lm-eval[api]==0.4.13' 'krasis-bundle[serve]'
    python -m scripts.outside.lm_eval_perplexity tiny.krasis --text heldout.txt --max-length 512

Exit code 1 if the perplexities differ by more than --tolerance, relatively. ``--lm-eval`` names a command in
another virtual environment.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from krasis.runtime import Engine, EngineSettings
from scripts.perplexity import bundle_model, negative_log_likelihood, windows

SERVE = [
    sys.executable,
    "-c",
    "from krasis.runtime.server.command import main; main(prog_name='krasis-serve')",
]
TASK = """task: krasis_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""


@contextmanager
def served(bundle: Path, context: int) -> Iterator[str]:
    """A server's address."""
    command = [*SERVE, str(bundle), "--port", "0", "--ctx", str(context), "--quiet", "--no-ui"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if process.stderr is None:
            raise click.ClickException("krasis-serve has no stderr")
        try:
            for line in process.stderr:
                if found := re.search(r"on (http://\S+)/v1", line):
                    yield found[1]
                    return
            raise click.ClickException("krasis-serve ended")
        finally:
            process.send_signal(signal.SIGTERM)


def expected(bundle: Path, texts: Sequence[str], max_length: int, first: int) -> float:
    """Bits of all texts, by an engine and the windows of scripts/perplexity. first: the token before each
    text."""
    total = 0.0
    with Engine.open(bundle, EngineSettings(context=max_length + 2)) as engine:
        model = bundle_model(engine)
        for text in texts:
            tokens = [first, *engine.text.tokenizer.encode(text)]
            for window in windows(tokens, max_length + 1, max_length):
                total += negative_log_likelihood(model(window.tokens), window)[0]
    return total / math.log(2)


def measured(command: str, folder: Path, url: str, max_length: int, tokenizer: Path) -> dict[str, Any]:
    """lm-eval's results of the task."""
    model = f"model=krasis,base_url={url}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface"
    # It takes one off for the token that is made, and one for the first of a window, which has no score.
    options = f"{model},tokenized_requests=True,num_concurrent=4,max_length={max_length + 2},max_retries=1"
    out = folder / "out"
    done = subprocess.run(
        [
            *shlex.split(command),
            *("--model", "local-completions", "--model_args", options, "--tasks", "krasis_text"),
            *("--include_path", str(folder), "--output_path", str(out), "--batch_size", "4"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = sorted(out.rglob("results_*.json"))
    if done.returncode or not found:
        raise click.ClickException(f"lm-eval failed:\n{done.stdout[-4000:]}")
    results: dict[str, Any] = json.loads(found[-1].read_text("utf-8"))["results"]["krasis_text"]
    return results


def tokenizer_of(bundle: Path, folder: Path) -> tuple[Path, int]:
    """The bundle's tokenizer as a folder for transformers, and the token that lm-eval puts before a text."""
    from transformers import AutoTokenizer

    from krasis.formats.bundle.reader import Bundle

    folder.mkdir()
    with Bundle.open(bundle) as opened:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(opened.asset(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return folder, int(first)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--text", "text_file", required=True, type=click.Path(path_type=Path), help="UTF-8 text.")
@click.option("--max-length", default=512, show_default=True, help="Tokens that are scored at once.")
@click.option("--num-texts", default=4, show_default=True, help="Pieces that the text is cut into.")
@click.option("--max-bytes", type=int, help="Use the text's beginning only.")
@click.option("--tolerance", default=1e-4, show_default=True, help="Allowed relative difference.")
@click.option("--lm-eval", "command", default="lm_eval", show_default=True, help="Command of lm-eval.")
def main(bundle: Path, text_file: Path, max_length: int, num_texts: int, **options: Any) -> None:
    """Compare perplexity over HTTP with perplexity by an engine."""
    text = text_file.read_bytes()[: options["max_bytes"]].decode("utf-8", "ignore")
    size = -(-len(text) // num_texts)
    texts = [text[at : at + size] for at in range(0, len(text), size)]
    num_bytes = len(text.encode())
    with tempfile.TemporaryDirectory(prefix="krasis-lm-eval-") as scratch:
        folder = Path(scratch)
        data = folder / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), "utf-8")
        (folder / "krasis_text.yaml").write_text(TASK.format(data=data), "utf-8")
        tokenizer, first = tokenizer_of(bundle, folder / "tokenizer")
        with served(bundle, max_length + 8) as url:
            found = measured(options["command"], folder, url, max_length, tokenizer)
    bits = expected(bundle, texts, max_length, first) / num_bytes
    wanted = {"bits_per_byte": bits, "byte_perplexity": 2**bits}
    worst = 0.0
    for name, value in wanted.items():
        got = found[f"{name},none"]
        worst = max(worst, abs(got / value - 1))
        click.echo(f"{name:16} lm-eval {got:.8f}  engine {value:.8f}  {got / value - 1:+.1e}")
    if worst > options["tolerance"]:
        raise click.ClickException(f"they differ by {worst:.1e}, more than {options['tolerance']:g}")


if __name__ == "__main__":
    main()
