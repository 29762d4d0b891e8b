"""The shape of tiny Qwen3-MoE models, as the hub describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model just large enough that every layout has more than one tile."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 4
    top_k: int = 2
    intermediate: int = 128
    vocab: int = 100
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """config.json as the hub has it."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "max_position_embeddings": 512,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hub names to shapes."""
        h, d = self.hidden, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            p = f"model.layers.{i}."
            shapes |= {
                f"{p}self_attn.q_proj.weight": (self.heads * d, h),
                f"{p}self_attn.k_proj.weight": (self.kv_heads * d, h),
                f"{p}self_attn.v_proj.weight": (self.kv_heads * d, h),
                f"{p}self_attn.o_proj.weight": (h, self.heads * d),
                f"{p}self_attn.q_norm.weight": (d,),
                f"{p}self_attn.k_norm.weight": (d,),
                f"{p}input_layernorm.weight": (h,),
                f"{p}post_attention_layernorm.weight": (h,),
                f"{p}mlp.gate.weight": (self.experts, h),
            }
            for e in range(self.experts):
                shapes |= {
                    f"{p}mlp.experts.{e}.gate_proj.weight": (self.intermediate, h),
                    f"{p}mlp.experts.{e}.up_proj.weight": (self.intermediate, h),
                    f"{p}mlp.experts.{e}.down_proj.weight": (h, self.intermediate),
                }
        shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, h)
        return shapes
