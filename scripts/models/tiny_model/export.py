"""A trained model in Hugging Face form, its check against transformers, and its provenance."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.models.model_files import (
    BF16_BYTES,
    Bf16Bits,
    from_bf16,
    hub_config,
    num_values,
    tensor_shapes,
    to_bf16,
    write_checkpoint,
)
from scripts.models.tiny_model.chat_pairs import IM_END
from scripts.models.tiny_model.corpus import HELD_OUT, VALIDATION, Corpus
from scripts.models.tiny_model.network import TinyMoe, num_parameters
from scripts.models.tiny_model.tokenizer import END_OF_TEXT, token_id, write_tokenizer
from scripts.models.tiny_model.training import TrainingResult, TrainingSettings

MAX_LOGIT_ERROR = 1e-3
HASHED_SUFFIXES = (".json", ".safetensors", ".txt")


def hub_tensors(model: TinyMoe) -> dict[str, Tensor]:
    """The model's weights under their hub names, float32 on the CPU, experts apart."""
    shape = model.shape
    state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    out = {"model.embed_tokens.weight": state["embedding.weight"]}
    for layer in range(shape.num_hidden_layers):
        ours, hub = f"layers.{layer}", f"model.layers.{layer}"
        out[f"{hub}.input_layernorm.weight"] = state[f"{ours}.input_norm.weight"]
        out[f"{hub}.post_attention_layernorm.weight"] = state[f"{ours}.post_norm.weight"]
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            out[f"{hub}.self_attn.{part}.weight"] = state[f"{ours}.attention.{part}.weight"]
        out[f"{hub}.mlp.gate.weight"] = state[f"{ours}.moe.router.weight"]
        inner = shape.moe_intermediate_size
        for expert in range(shape.num_experts):
            rows = slice(expert * inner, (expert + 1) * inner)
            base = f"{hub}.mlp.experts.{expert}"
            out[f"{base}.gate_proj.weight"] = state[f"{ours}.moe.gate.weight"][rows]
            out[f"{base}.up_proj.weight"] = state[f"{ours}.moe.up.weight"][rows]
            out[f"{base}.down_proj.weight"] = state[f"{ours}.moe.down.weight"][:, rows]
    out["model.norm.weight"] = state["norm.weight"]
    return out


def round_to_bf16(model: TinyMoe) -> None:
    """Replace every weight by its BF16 rounding, kept as float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            bits = to_bf16(parameter.detach().float().cpu().numpy())
            parameter.copy_(torch.from_numpy(from_bf16(bits)))


def export(model: TinyMoe, tokenizer: Tokenizer, folder: Path) -> int:
    """Write weights (two shards or more), config and tokenizer; return the weights' bytes."""
    shape = model.shape
    end, pad = token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)
    config = json.dumps(hub_config(shape, eos=end, pad=pad), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    write_tokenizer(tokenizer, folder, shape.max_position_embeddings)
    shapes = tensor_shapes(shape)
    tensors = hub_tensors(model)

    def pieces() -> Iterator[Bf16Bits]:
        for name, dims in shapes.items():
            if tuple(tensors[name].shape) != dims:
                raise ValueError(f"{name}: is {tuple(tensors[name].shape)}, should be {dims}")
            yield to_bf16(tensors[name].numpy())

    total = sum(num_values(dims) for dims in shapes.values()) * BF16_BYTES
    return write_checkpoint(folder, shapes, pieces(), max_shard_bytes=total * 3 // 5)


def logit_error(model: TinyMoe, folder: Path, tokens: Tensor) -> float:
    """|ours - transformers'| / |transformers'| over the logits of int64 [batch, length], float32.

    Loads `folder` as any user would. Moves `model` to the CPU: on one device the two round alike,
    while across devices a near tie in a router could go to different experts.
    """
    from transformers import Qwen3MoeForCausalLM

    reference = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.train(False)
    model.cpu().eval()
    with torch.no_grad():
        expected = reference(tokens.cpu()).logits.double()
        got = model(tokens.cpu())[0].double()
    return float((got - expected).norm() / expected.norm())


def tokenizer_agrees(tokenizer: Tokenizer, folder: Path, text: str) -> bool:
    """Whether transformers' own loading of `folder` gives our token ids, and back our text."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    ids = list(tokenizer.encode(text).ids)
    return list(loaded(text)["input_ids"]) == ids and loaded.decode(ids) == text


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What PROVENANCE.md says beside the corpus, the settings and the result."""

    seed: int
    device: str
    held_out_perplexity: float
    held_out_tokens: int
    logit_error: float
    stream_tokens: dict[str, int]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_provenance(
    folder: Path,
    model: TinyMoe,
    corpus: Corpus,
    settings: TrainingSettings,
    result: TrainingResult,
    facts: RunFacts,
) -> None:
    """Write PROVENANCE.md: where every byte in `folder` comes from."""
    streams = ", ".join(f"{name} {count:,}" for name, count in facts.stream_tokens.items())
    files = sorted(p for p in folder.iterdir() if p.suffix in HASHED_SUFFIXES)
    hashes = "\n".join(f"| `{p.name}` | {p.stat().st_size:,} | `{_sha256(p)}` |" for p in files)
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    text = f"""# Provenance

A Qwen3-MoE of {num_parameters(model):,} parameters, trained from random weights by
`scripts/models/make_tiny_model.py` of this repository. No other model's weights or output went into it.

| | |
| --- | --- |
| made | {stamp} |
| command | `{shlex.join(["python", *sys.argv])}` |
| device | {facts.device} |
| software | Python {platform.python_version()}, torch {torch.__version__} |
| corpus | {corpus.num_files:,} files, {corpus.num_bytes:,} characters of a Python standard \
library (`{corpus.stdlib.name}`) and its language topics (licence PSF-2.0); sha256 of what was \
read `{corpus.sha256}` |
| tokens in the corpus | {streams} |
| held out, never trained on | modules {", ".join(HELD_OUT.modules)}; topics \
{", ".join(HELD_OUT.topics)}: `heldout.txt` |
| validation, never trained on | modules {", ".join(VALIDATION.modules)}; topics \
{", ".join(VALIDATION.topics)}: chose the checkpoint |
| seed | {facts.seed} |
| steps | {result.num_steps:,} of {settings.batch} x 512 tokens, {result.num_tokens:,} tokens in \
{result.elapsed_s:.0f} s; kept: {result.best_source} at step {result.best_step:,} |
| optimiser | AdamW, peak rate {settings.peak_lr}, weight decay {settings.weight_decay} |
| final training loss | {result.final_loss:.4f} |
| validation perplexity | {result.best_perplexity:.3f} (training precision) |
| held-out perplexity | {facts.held_out_perplexity:.4f} (weights rounded to BF16, float32 \
arithmetic, windows of 512 tokens, first token of each as context only, \
{facts.held_out_tokens:,} tokens) |
| logits against transformers, float32 | relative error {facts.logit_error:.2e} |

Wall-clock budgets and GPU arithmetic make a second run similar, not identical.

| file | bytes | sha256 |
| --- | --- | --- |
{hashes}
"""
    (folder / "PROVENANCE.md").write_text(text, encoding="utf-8")
