"""Qwen3-MoE in compact torch for training: every expert computed, unchosen ones weighted zero.

With few experts the dense form wins: the experts of a layer become one wide matrix product, and
the routing weight scales each expert's slice of the intermediate activations before the shared
down-projection adds them up.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.models.model_files import MoeShape


def rope_tables(shape: MoeShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, head_dim], halves repeated as Hugging Face's rotary does."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / (shape.rope_theta**exponent))
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention with per-head query and key norms."""

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.shape.head_dim)
        values = self.v_proj(x).view(split).transpose(1, 2)
        queries = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin)
        keys = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        # The norms work in float32; back to the projections' type for the fused kernels.
        out = functional.scaled_dot_product_attention(
            queries.to(values.dtype),
            keys.to(values.dtype).repeat_interleave(group, dim=1),
            values.repeat_interleave(group, dim=1),
            is_causal=True,
        )
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class SparseMoe(nn.Module):
    """Router and experts. `gate`/`up` [experts * i, hidden], `down` [hidden, experts * i]."""

    def __init__(self, shape: MoeShape) -> None:
        super().__init__()
        self.shape = shape
        wide = shape.num_experts * shape.moe_intermediate_size
        self.router = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.gate = nn.Linear(shape.hidden_size, wide, bias=False)
        self.up = nn.Linear(shape.hidden_size, wide, bias=False)
        self.down = nn.Linear(wide, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture [batch, length, hidden] and the load-balancing loss (scalar)."""
        shape = self.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = functional.linear(x.float(), self.router.weight).softmax(dim=-1)
        top, chosen = scores.topk(shape.num_experts_per_tok, dim=-1)
        top = top / top.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(-1, chosen, top)
        hidden = functional.silu(self.gate(x)) * self.up(x)
        split = hidden.view(*x.shape[:-1], shape.num_experts, shape.moe_intermediate_size)
        mixed = self.down((split * weights[..., None].to(hidden.dtype)).flatten(-2))
        # Switch-Transformer balance: experts * sum(share of tokens * mean probability), 1 at best.
        share = (weights > 0).float().mean(dim=(0, 1)) / shape.num_experts_per_tok
        balance = shape.num_experts * (share * scores.mean(dim=(0, 1))).sum()
        return mixed, balance


class DecoderLayer(nn.Module):
    """Pre-norm attention and pre-norm mixture of experts, each added to the residual stream."""

    def __init__(self, shape: MoeShape, dropout: float) -> None:
        super().__init__()
        self.input_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.attention = Attention(shape)
        self.post_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.moe = SparseMoe(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.attention(self.input_norm(x), cos, sin))
        mixed, balance = self.moe(self.post_norm(x))
        return x + self.dropout(mixed), balance


class TinyMoe(nn.Module):
    """The whole network; the embedding is also the output head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: MoeShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        cos, sin = rope_tables(shape, shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_scale = (2 * self.shape.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            last = name.endswith(("o_proj.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 * (residual_scale if last else 1.0))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [batch, length] -> logits [batch, length, vocab] and mean balance loss."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.dropout(self.embedding(tokens))
        balance = torch.zeros((), device=tokens.device)
        for layer in self.layers:
            x, loss = layer(x, cos, sin)
            balance = balance + loss / len(self.layers)
        return functional.linear(self.norm(x), self.embedding.weight), balance


def num_parameters(model: nn.Module) -> int:
    """Trainable values, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
