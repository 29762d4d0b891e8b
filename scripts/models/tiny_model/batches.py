"""Token tensors on the training device, and random windows out of them."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.models.tiny_model.corpus import STREAM_WEIGHTS, Corpus
from scripts.models.tiny_model.tokenizer import END_OF_TEXT, token_id

ENCODE_BATCH = 256


def encode_text(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of one text, int64 [tokens]."""
    return torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64)


def _encode_documents(tokenizer: Tokenizer, documents: list[str]) -> tuple[list[int], list[int]]:
    """All documents with an end-of-text after each, and where each begins."""
    end = token_id(tokenizer, END_OF_TEXT)
    tokens: list[int] = []
    starts: list[int] = []
    for first in range(0, len(documents), ENCODE_BATCH):
        # The fast form leaves character offsets out, which are most of an encoding's memory.
        for encoding in tokenizer.encode_batch_fast(documents[first : first + ENCODE_BATCH]):
            starts.append(len(tokens))
            tokens.extend(encoding.ids)
            tokens.append(end)
    return tokens, starts


@dataclass(slots=True)
class WindowSampler:
    """Draws training windows; all tensors lie on the training device.

    `tokens` int32 [total]; `starts` int64 [candidates], stream by stream; `first` and `count`
    int64 [streams] say which candidates belong to a stream; `weights` float32 [streams].
    """

    tokens: Tensor
    starts: Tensor
    first: Tensor
    count: Tensor
    weights: Tensor
    num_tokens: dict[str, int]
    length: int
    generator: torch.Generator

    def draw(self, batch: int) -> Tensor:
        """Windows of `length + 1` tokens, int64 [batch, length + 1]."""
        device = self.tokens.device
        stream = torch.multinomial(self.weights, batch, replacement=True, generator=self.generator)
        # float64: a float32 fraction cannot address every one of millions of positions.
        fraction = torch.rand(batch, generator=self.generator, device=device, dtype=torch.float64)
        index = self.first[stream] + (fraction * self.count[stream]).long()
        offsets = torch.arange(self.length + 1, device=device)
        return self.tokens[self.starts[index][:, None] + offsets].long()


def make_sampler(
    corpus: Corpus, tokenizer: Tokenizer, length: int, device: torch.device, seed: int
) -> WindowSampler:
    """Tokenise every stream and put it on the device.

    Chat windows begin where a conversation begins, as a chat does; the others anywhere. A stream
    shorter than one window is left out. Raises ValueError when none is left.
    """
    parts: list[Tensor] = []
    candidates: list[Tensor] = []
    weights: list[float] = []
    num_tokens: dict[str, int] = {}
    base = 0
    for name, documents in corpus.streams.items():
        tokens, starts = _encode_documents(tokenizer, documents)
        last = len(tokens) - length - 1
        if last <= 0:
            continue
        allowed = starts if name == "chat" else range(last)
        chosen = torch.tensor([s for s in allowed if s < last], dtype=torch.int64)
        parts.append(torch.tensor(tokens, dtype=torch.int32))
        candidates.append(chosen + base)
        weights.append(STREAM_WEIGHTS[name])
        num_tokens[name] = len(tokens)
        base += len(tokens)
    if not parts:
        raise ValueError(f"no stream holds a window of {length + 1} tokens")
    count = torch.tensor([len(part) for part in candidates])
    return WindowSampler(
        tokens=torch.cat(parts).to(device),
        starts=torch.cat(candidates).to(device),
        first=(count.cumsum(0) - count).to(device),
        count=count.to(device),
        weights=torch.tensor(weights, device=device),
        num_tokens=num_tokens,
        length=length,
        generator=torch.Generator(device=device).manual_seed(seed),
    )
