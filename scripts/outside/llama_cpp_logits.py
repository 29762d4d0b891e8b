#!/usr/bin/env python3
"""Logits of llama.cpp for a GGUF and given tokens, then for those that it chooses itself.

    python llama_cpp_logits.py MODEL.gguf OUT.npz --tokens 1,2,3 --generate 64

For a Python that has the package llama-cpp-python; nothing of this project is imported. The file holds
``tokens`` [n + generate] and ``logits`` [n + generate, vocabulary]: row i is what follows token i.
"""

from __future__ import annotations

import argparse

import llama_cpp  # the only place that needs it
import numpy as np


def open_context(path: str, length: int, threads: int) -> tuple[object, object, int]:
    """The model, a context of so many tokens in f16, and the vocabulary's size."""
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers, settings.use_extra_bufts = 0, False  # repacking wants larger models
    model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit(f"{path}: llama.cpp does not load it")
    choices = llama_cpp.llama_context_default_params()
    choices.n_ctx = choices.n_batch = choices.n_ubatch = max(length, 64)
    choices.n_outputs_max = choices.n_outputs_max_per_seq = max(length, 64)
    choices.n_seq_max = 1
    choices.n_threads = choices.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, choices)
    if not context:
        raise SystemExit(f"{path}: llama.cpp opens no context")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return model, context, size


def run(context: object, tokens: list[int], start: int, size: int) -> np.ndarray:
    """Logits [len(tokens), size] of tokens that follow ``start`` earlier ones."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        if status := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode: {status}")
        rows = [llama_cpp.llama_get_logits_ith(context, index) for index in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])
    finally:
        llama_cpp.llama_batch_free(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    tokens = [int(token) for token in given.tokens.split(",")]
    model, context, size = open_context(given.model, len(tokens) + given.generate, given.threads)
    rows = [run(context, tokens, 0, size)]
    for _ in range(given.generate):
        tokens.append(int(rows[-1][-1].argmax()))
        rows.append(run(context, tokens[-1:], len(tokens) - 1, size))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    np.savez(given.out, tokens=np.array(tokens), logits=np.concatenate(rows))


if __name__ == "__main__":
    main()
