"""The names that decoders of one pattern give their tensors, on the hub and in a GGUF."""

from __future__ import annotations

from krasis.formats.models.family import Source

_HF, _GGUF = "model.layers.{i}.", "blk.{i}."
PARTS = ("gate", "up", "down")


def decoder_names(
    *,
    mlp: str = "mlp",
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ffn_norm: str = "ffn_norm",
    qk_norm: bool = True,
    permuted: bool = False,
    biases: bool = False,
    shared: str | None = None,
    shared_gate: str | None = None,
    dense: bool = False,
    correction: bool = False,
) -> dict[str, Source]:
    """Sources by bundle tensor or part.

    mlp: the hub's name of the block with the experts; expert_parts: its names of gate, up and down. ffn_norm:
    the GGUF's name of the norm before it. permuted: GGUF keeps the rows of q and k in another order. biases:
    of q, k, v. shared, shared_gate: the hub's names of the shared experts and of the projection that weighs
    them, in that block. dense, correction: whether there are dense layers, a correction bias.
    """
    names = _model() | _attention(permuted, biases)
    if qk_norm:
        names |= {f"attention.{x}_norm": _weight(f"self_attn.{x}_norm", f"attn_{x}_norm") for x in ("q", "k")}
    names["attention.norm"] = _weight("input_layernorm", "attn_norm")
    names["experts.norm"] = _weight("post_attention_layernorm", ffn_norm)
    blocks = tuple(
        dict.fromkeys((mlp, "mlp"))
    )  # transformers 5 calls it mlp in memory, whatever the hub does
    routers = tuple(f"{_HF}{block}.gate.weight" for block in blocks)
    names["experts.router"] = Source(routers, (f"{_GGUF}ffn_gate_inp.weight",))
    if correction:
        names["experts.router.correction_bias"] = Source(
            (f"{_HF}{mlp}.gate.e_score_correction_bias",), (f"{_GGUF}exp_probs_b.bias",)
        )
    if dense:
        names["mlp.norm"] = names["experts.norm"]
        names |= {f"mlp.{part}_proj": _weight(f"{mlp}.{part}_proj", f"ffn_{part}") for part in PARTS}
    if shared:
        names |= {
            f"shared.{part}_proj": _weight(f"{mlp}.{shared}.{part}_proj", f"ffn_{part}_shexp")
            for part in PARTS
        }
    if shared_gate:
        names["shared.gate"] = _weight(f"{mlp}.{shared_gate}", "ffn_gate_inp_shexp")
    return names | _experts(blocks, expert_parts)


def _weight(hf: str, gguf: str) -> Source:
    return Source((f"{_HF}{hf}.weight",), (f"{_GGUF}{gguf}.weight",))


def _model() -> dict[str, Source]:
    return {
        "embedding": Source(("model.embed_tokens.weight",), ("token_embd.weight",)),
        "final_norm": Source(("model.norm.weight",), ("output_norm.weight",)),
        "lm_head": Source(("lm_head.weight",), ("output.weight",)),
    }


def _attention(permuted: bool, biases: bool) -> dict[str, Source]:
    names: dict[str, Source] = {}
    for part in ("q", "k", "v"):
        for kind in ("weight", "bias") if biases else ("weight",):
            ours = f"attention.{part}" + (".bias" if kind == "bias" else "")
            hf, gguf = f"{_HF}self_attn.{part}_proj.{kind}", f"{_GGUF}attn_{part}.{kind}"
            undone = permuted and part != "v"
            names[ours] = Source((hf,), (gguf,), gguf_transform="undo_rope_permutation" if undone else "none")
    return names | {"attention.output": _weight("self_attn.o_proj", "attn_output")}


def _experts(blocks: tuple[str, ...], parts: tuple[str, str, str]) -> dict[str, Source]:
    """Of each matrix alone, and of gate and up together where a checkpoint keeps them so (gate first).
    blocks: names of the block with the experts, the hub's first.
    """
    root = f"{_HF}{blocks[0]}.experts."
    fused = [f"{_HF}{block}.experts." for block in blocks]
    names = {
        f"experts.{ours}": Source(
            (f"{root}{{e}}.{part}.weight",),
            (f"{_GGUF}ffn_{ours}_exps.weight", f"{_GGUF}ffn_{ours}.{{e}}.weight"),
        )
        for ours, part in zip(PARTS, parts, strict=True)
    }
    down = names["experts.down"]
    names["experts.down"] = Source((*down.hf, *(f"{one}down_proj" for one in fused)), down.gguf)
    both = tuple(f"{one}gate_up_proj" for one in fused)
    names["experts.gate_up"] = Source(both, (f"{_GGUF}ffn_gate_up_exps.weight",))
    return names
