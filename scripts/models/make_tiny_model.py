#!/usr/bin/env python3
"""Train a tiny, real Qwen3-MoE on Python's standard library; write it as safetensors or GGUF.

python -m scripts.models.make_tiny_model train --out tiny-qwen3-moe --minutes 5 --device auto
python -m scripts.models.make_tiny_model gguf --model tiny-qwen3-moe --out tiny-q8_0.gguf
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from scripts.models.model_files import TINY_SHAPE, MoeShape
from scripts.models.moe_gguf import GGUF_TYPES, write_gguf
from scripts.models.tiny_model.batches import encode_text, make_sampler
from scripts.models.tiny_model.corpus import Corpus, build_corpus
from scripts.models.tiny_model.export import (
    MAX_LOGIT_ERROR,
    RunFacts,
    export,
    logit_error,
    round_to_bf16,
    tokenizer_agrees,
    write_provenance,
)
from scripts.models.tiny_model.network import TinyMoe, num_parameters
from scripts.models.tiny_model.sampling import print_samples
from scripts.models.tiny_model.tokenizer import train_tokenizer
from scripts.models.tiny_model.training import Trainer, TrainingSettings, perplexity

logger = logging.getLogger("make_tiny_model")

WINDOW = 512
SAMPLE_TOKENS = 120
CPU_SAMPLE_TOKENS = 16  # every token recomputes the whole text
CHECK_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Everything `train` needs; tests make smaller ones."""

    out: Path
    seed: int
    device: torch.device
    settings: TrainingSettings
    shape: MoeShape = TINY_SHAPE
    window: int = WINDOW
    dropout: float = 0.1
    stdlib: Path | None = None
    max_files: int | None = None
    sample_tokens: int = SAMPLE_TOKENS


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises click.UsageError for a CUDA that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA device here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device in words, for the record."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def _load_corpus(request: TrainRequest) -> Corpus:
    started = time.monotonic()
    corpus = build_corpus(request.seed, request.stdlib, max_files=request.max_files)
    logger.info(
        "corpus %s: %d files, %.1f million characters, %d chat pairs, %.1f s",
        corpus.stdlib,
        corpus.num_files,
        corpus.num_bytes / 1e6,
        len(corpus.pairs),
        time.monotonic() - started,
    )
    return corpus


def train_model(request: TrainRequest) -> float:
    """Run the whole recipe; return the held-out perplexity of the BF16 weights.

    Raises ValueError when transformers reads the result differently from how it was trained.
    """
    torch.manual_seed(request.seed)
    torch.set_float32_matmul_precision("high")
    corpus = _load_corpus(request)
    started = time.monotonic()
    tokenizer = train_tokenizer(corpus.documents(), request.shape.vocab_size)
    logger.info("tokenizer: %.1f s", time.monotonic() - started)
    started = time.monotonic()
    sampler = make_sampler(corpus, tokenizer, request.window, request.device, request.seed)
    logger.info("tokens by stream: %s, %.1f s", sampler.num_tokens, time.monotonic() - started)
    validation = encode_text(tokenizer, corpus.validation).to(request.device)
    held_out = encode_text(tokenizer, corpus.held_out).to(request.device)
    model = TinyMoe(request.shape, request.dropout).to(request.device)
    logger.info("model: %.2f million parameters on %s", num_parameters(model) / 1e6, request.device)
    result = Trainer(model, sampler, validation, request.settings).run()

    # From here on exact: TF32 products would blur the comparison with transformers.
    torch.set_float32_matmul_precision("highest")
    round_to_bf16(model)
    found = perplexity(model, held_out, request.window)
    print(f"held-out perplexity, BF16 weights: {found:.4f} over {len(held_out)} tokens")
    print_samples(model, tokenizer, request.sample_tokens)
    request.out.mkdir(parents=True, exist_ok=True)
    written = export(model, tokenizer, request.out)
    (request.out / "heldout.txt").write_text(corpus.held_out, encoding="utf-8")
    check = held_out[: 2 * CHECK_TOKENS].view(2, -1)
    error = logit_error(model, request.out, check)
    print(f"logits against transformers, float32: relative error {error:.2e}")
    if error >= MAX_LOGIT_ERROR:
        raise ValueError(f"logits differ by {error:.2e}, limit {MAX_LOGIT_ERROR}")
    if not tokenizer_agrees(tokenizer, request.out, corpus.held_out):
        raise ValueError("transformers tokenises the held-out text differently")
    facts = RunFacts(
        seed=request.seed,
        device=device_name(request.device),
        held_out_perplexity=found,
        held_out_tokens=len(held_out),
        logit_error=error,
        stream_tokens=sampler.num_tokens,
    )
    write_provenance(request.out, model, corpus, request.settings, result, facts)
    print(f"wrote {request.out}: {written / 1e6:.2f} MB of weights")
    return found


@click.group()
@click.option("--verbose", is_flag=True, help="Also say which files were left out, and why.")
def main(verbose: bool) -> None:
    """Make a tiny Qwen3-MoE."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(message)s")


@main.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--minutes", type=click.FloatRange(min=0.01), default=5.0, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="End after so many steps, not minutes.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), default="auto")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), help="Windows of 512 [64; 4 on a CPU].")
@click.option("--lr", type=float, default=2.5e-3, show_default=True, help="Peak learning rate.")
@click.option("--dropout", type=click.FloatRange(0.0, 0.9), default=0.1, show_default=True)
@click.option("--compile/--no-compile", "use_compile", default=None, help="[on with CUDA]")
@click.option(
    "--stdlib",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A standard library to read instead of the running Python's.",
)
def train(
    out: Path,
    minutes: float,
    steps: int | None,
    device: str,
    seed: int,
    batch: int | None,
    lr: float,
    dropout: float,
    use_compile: bool | None,
    stdlib: Path | None,
) -> None:
    """Train, and write the model in Hugging Face form to OUT."""
    where = resolve_device(device)
    on_gpu = where.type == "cuda"
    settings = TrainingSettings(
        batch=batch if batch is not None else (64 if on_gpu else 4),
        peak_lr=lr,
        warmup_steps=200 if on_gpu else 20,
        duration_s=minutes * 60,
        num_steps=steps,
        report_every_s=5.0,
        num_evaluations=20,
        weight_decay=0.1,
        compile=on_gpu if use_compile is None else use_compile,
    )
    request = TrainRequest(
        out=out,
        seed=seed,
        device=where,
        settings=settings,
        dropout=dropout,
        stdlib=stdlib,
        sample_tokens=SAMPLE_TOKENS if on_gpu else CPU_SAMPLE_TOKENS,
    )
    try:
        train_model(request)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@main.command("gguf")
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--type", "type_name", type=click.Choice(sorted(GGUF_TYPES)), default="q8_0")
@click.option("--name", default="tiny-qwen3-moe", show_default=True, help="general.name")
def write_gguf_file(model: Path, out: Path, type_name: str, name: str) -> None:
    """Write the model of folder MODEL as the GGUF file OUT."""
    try:
        size = write_gguf(model, out, type_name, name)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print(f"wrote {out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
