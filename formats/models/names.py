"""The names that decoders of one pattern give their tensors, on the hub and in a GGUF."""

from __future__ import annotations

from krasis.formats.models.family import Source

_GGUF = "blk.{i}."
PARTS = ("gate", "up", "down")
CORRECTION = "gate.e_score_correction_bias"
"""The usual name of a router's correction bias in the block with the experts."""


def decoder_names(
    *,
    root: str = "model.",
    mlp: str = "mlp",
    router: str = "gate",
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ffn_norm: str = "ffn_norm",
    qk_norm: bool = True,
    permuted: bool = False,
    biases: bool = False,
    shared: str | None = None,
    shared_gate: str | None = None,
    dense: bool = False,
    correction: str | None = None,
    transposed: bool = False,
    interleaved: bool = False,
) -> dict[str, Source]:
    """Sources by bundle tensor or part.

    root: before the hub's names. mlp: its name of the block with the experts, router: of what scores them;
    expert_parts: its names of gate, up and down. ffn_norm: the GGUF's name of the norm before it. permuted:
    GGUF keeps the rows of q and k in another order. biases: of q, k, v. shared, shared_gate: the hub's names
    of the shared experts and of the projection that weighs them, in that block. dense: whether there are
    layers without experts. correction: the hub's name of the correction bias, in that block. transposed: a
    tensor of all experts may hold their matrices so. interleaved: and gate and up row by row.
    """
    layer = f"{root}layers.{{i}}."
    # transformers 5 calls the block mlp in memory, whatever the hub does.
    blocks = tuple(f"{layer}{one}." for one in dict.fromkeys((mlp, "mlp")))
    block = blocks[0]
    names = _model(root) | _attention(f"{layer}self_attn.", permuted, biases)
    if qk_norm:
        names |= {
            f"attention.{x}_norm": _weight(f"{layer}self_attn.{x}_norm", f"attn_{x}_norm") for x in ("q", "k")
        }
    names["attention.norm"] = _weight(f"{layer}input_layernorm", "attn_norm")
    names["experts.norm"] = _weight(f"{layer}post_attention_layernorm", ffn_norm)
    routers = (f"{block}{router}.weight", *(f"{one}gate.weight" for one in blocks[1:]))
    names["experts.router"] = Source(routers, (f"{_GGUF}ffn_gate_inp.weight",))
    if correction:
        # llama.cpp knows one such name by its ending, of others it adds no suffix.
        gguf = f"{_GGUF}exp_probs_b" + (".bias" if correction.endswith("e_score_correction_bias") else "")
        names["experts.router.correction_bias"] = Source(
            tuple(f"{one}{correction}" for one in blocks), (gguf,)
        )
    if dense:
        names["mlp.norm"] = names["experts.norm"]
        names |= {f"mlp.{part}_proj": _weight(f"{layer}mlp.{part}_proj", f"ffn_{part}") for part in PARTS}
    if shared:
        names |= {
            f"shared.{part}_proj": _weight(f"{block}{shared}.{part}_proj", f"ffn_{part}_shexp")
            for part in PARTS
        }
    if shared_gate:
        names["shared.gate"] = _weight(f"{block}{shared_gate}", "ffn_gate_inp_shexp")
    roots = tuple(f"{one}experts." for one in blocks)
    return names | _experts(roots, expert_parts, transposed, interleaved)


def _weight(hf: str, gguf: str) -> Source:
    return Source((f"{hf}.weight",), (f"{_GGUF}{gguf}.weight",))


def _model(root: str) -> dict[str, Source]:
    return {
        "embedding": Source((f"{root}embed_tokens.weight",), ("token_embd.weight",)),
        "final_norm": Source((f"{root}norm.weight",), ("output_norm.weight",)),
        "lm_head": Source(("lm_head.weight",), ("output.weight",)),
    }


def _attention(block: str, permuted: bool, biases: bool) -> dict[str, Source]:
    names: dict[str, Source] = {}
    for part in ("q", "k", "v"):
        for kind in ("weight", "bias") if biases else ("weight",):
            ours = f"attention.{part}" + (".bias" if kind == "bias" else "")
            hf, gguf = f"{block}{part}_proj.{kind}", f"{_GGUF}attn_{part}.{kind}"
            undone = permuted and part != "v"
            names[ours] = Source((hf,), (gguf,), gguf_transform="undo_rope_permutation" if undone else "none")
    return names | {"attention.output": _weight(f"{block}o_proj", "attn_output")}


def _experts(
    roots: tuple[str, ...], parts: tuple[str, str, str], transposed: bool, interleaved: bool
) -> dict[str, Source]:
    """Of each matrix alone, and of gate and up together where a checkpoint keeps them so (gate first).
    roots: of the experts' names, the hub's first.
    """
    root = roots[0]
    names = {
        f"experts.{ours}": Source(
            (f"{root}{{e}}.{part}.weight",),
            (f"{_GGUF}ffn_{ours}_exps.weight", f"{_GGUF}ffn_{ours}.{{e}}.weight"),
        )
        for ours, part in zip(PARTS, parts, strict=True)
    }
    down = names["experts.down"]
    names["experts.down"] = Source(
        (*down.hf, *(f"{one}down_proj" for one in roots)), down.gguf, transposed=transposed
    )
    both = tuple(f"{one}gate_up_proj" for one in roots), (f"{_GGUF}ffn_gate_up_exps.weight",)
    names["experts.gate_up"] = Source(*both, transposed=transposed, interleaved=interleaved)
    return names
