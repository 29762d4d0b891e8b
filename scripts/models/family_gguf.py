"""What a GGUF of a model of any family says and holds, by its description: metadata, and names and shapes of
the tensors as llama.cpp's converter writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import gguf

from krasis.convert.latent_parts import held_shape
from krasis.formats.models.gguf_blocks import SIGMOID, SOFTMAX
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.registry import family_of
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.tensor import Tensor
from krasis.formats.models.tensors import layer_tensors, top_tensors

PARTS = ("gate", "up", "down")
_GATING = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
IMPLIED_GATING = ("softmax_of_top",)  # by the architecture; llama.cpp's number of it is no router's here


def gguf_tensors(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name in the file, the model's own name, and shape [..., out, in] of every tensor."""
    before, after = top_tensors(spec)
    yield from _dense(spec, None, before)
    for i, layer in enumerate(spec.layers):
        yield from _dense(spec, i, (one for one in layer_tensors(spec, layer) if one.is_dense))
        yield from _experts(spec, i, layer)
    yield from _dense(spec, None, (one for one in after if one.name != "lm_head" or not spec.tied))


def _dense(
    spec: ModelSpec, number: int | None, tensors: Iterator[Tensor] | tuple[Tensor, ...]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    names = family_of(spec).names
    mixer = spec.layers[number].mixer if number is not None else None
    seen = set()
    for tensor in tensors:
        for ours, shape in tensor.sources():
            source = names[ours]
            there = list(shape)
            if isinstance(mixer, LatentAttention) and source.gguf_transform.startswith("latent"):
                there = list(held_shape(mixer, source.gguf_transform, together=False))
            elif source.gguf_pick is not None:
                pick = source.gguf_pick(mixer)
                there[pick.axis] = pick.of
            name = source.gguf[0].format(i=number)
            if name not in seen:  # of several parts of one
                seen.add(name)
                yield name, ours, tuple(there)


def _experts(spec: ModelSpec, number: int, layer: Layer) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    experts = layer.experts
    if experts is None:
        return
    names = family_of(spec).names
    for part in PARTS:
        rows = (experts.intermediate, spec.hidden)
        shape = (experts.count, *(rows if part != "down" else rows[::-1]))
        yield names[f"experts.{part}"].gguf[0].format(i=number), f"experts.{part}", shape


def add_metadata(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    """Everything that llama.cpp wants to know of the model but its tokenizer. Raises ValueError for blocks
    that are not written here.
    """
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_layer_norm_rms_eps(spec.norm.eps)
    writer.add_vocab_size(spec.vocab)
    mixers = tuple(dict.fromkeys(layer.mixer for layer in spec.layers))
    plain = {replace(mixer, window=None) for mixer in mixers if isinstance(mixer, Attention)}
    if len(plain) > 1:
        raise ValueError("no GGUFs are written of layers whose attention is of several kinds")
    for one in plain:
        _add_attention(writer, one)
    for mixer in mixers:
        if isinstance(mixer, Attention):
            continue
        if isinstance(mixer, LatentAttention):
            _add_latent(writer, mixer)
        elif isinstance(mixer, GatedDelta):
            _add_delta(writer, mixer)
        else:
            raise ValueError(f"{type(mixer).__name__}: no GGUFs of such layers are written")
    kinds = [isinstance(layer.mixer, GatedDelta) for layer in spec.layers]
    if any(kinds):
        _add_interval(writer, spec, kinds)
    windows = {mixer.window for mixer in mixers if isinstance(mixer, Attention) and mixer.window}
    for window in windows:
        writer.add_sliding_window(window)
    _add_mlps(writer, spec)


def _add_interval(writer: gguf.GGUFWriter, spec: ModelSpec, is_linear: list[bool]) -> None:
    """How often a layer of attention comes, and how positions in pictures are rotated, which llama.cpp wants
    to know of Qwen3.5 and does not use for text."""
    writer.add_full_attention_interval(is_linear.index(False) + 1)
    mixer = spec.layers[is_linear.index(False)].mixer
    if family_of(spec).gguf == "qwen35moe" and isinstance(mixer, Attention) and mixer.rope is not None:
        third, rest = divmod(mixer.rope.dims // 2, 3)
        writer.add_rope_dimension_sections([third + rest, third, third, 0])


def _add_attention(writer: gguf.GGUFWriter, mixer: Attention) -> None:
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(mixer.kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    if mixer.rope is not None:
        _add_rope(writer, mixer.rope)


def _add_rope(writer: gguf.GGUFWriter, rope: Rope) -> None:
    scaling = rope.scaling
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.theta)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_positions)
    elif scaling.kind != "none":
        raise ValueError(f"{scaling.kind}: no GGUFs of such rope scaling are written")


def _add_latent(writer: gguf.GGUFWriter, mixer: LatentAttention) -> None:
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(1)
    if mixer.q_rank is not None:
        writer.add_q_lora_rank(mixer.q_rank)
    writer.add_kv_lora_rank(mixer.kv_rank)
    writer.add_key_length(mixer.kv_rank + mixer.rope_dim)
    writer.add_value_length(mixer.kv_rank)
    writer.add_key_length_mla(mixer.nope_dim + mixer.rope_dim)
    writer.add_value_length_mla(mixer.value_dim)
    if mixer.rope is None:
        raise ValueError("no GGUFs of latent attention without rotation are written")
    _add_rope(writer, mixer.rope)
    if mixer.rope.scaling.kind == "yarn":
        # The scale of attention is multiplied by it twice: 0.1 mscale ln(factor) + 1.
        factor = math.sqrt(mixer.scale * math.sqrt(mixer.nope_dim + mixer.rope_dim))
        writer.add_rope_scaling_yarn_log_mul((factor - 1) / math.log(mixer.rope.scaling.factor))


def _add_delta(writer: gguf.GGUFWriter, mixer: GatedDelta) -> None:
    writer.add_ssm_conv_kernel(mixer.conv_width)
    writer.add_ssm_state_size(mixer.key_dim)
    writer.add_ssm_group_count(mixer.key_heads)
    writer.add_ssm_time_step_rank(mixer.value_heads)
    writer.add_ssm_inner_size(mixer.value_heads * mixer.value_dim)


def _add_mlps(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    dense = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, GatedMlp)]
    routed = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, Experts)]
    if not routed or any(one != routed[0] for one in routed) or any(one != dense[0] for one in dense):
        raise ValueError("no GGUFs are written of layers whose experts are not all of one kind")
    experts = routed[0]
    writer.add_feed_forward_length(dense[0].intermediate if dense else experts.intermediate)
    if dense:
        writer.add_leading_dense_block_count(len(dense))
    writer.add_expert_count(experts.count)
    writer.add_expert_feed_forward_length(experts.intermediate)
    if experts.shared is not None:
        if experts.shared_gate:
            writer.add_expert_shared_feed_forward_length(experts.shared.intermediate)
        else:
            writer.add_expert_shared_count(experts.shared.intermediate // experts.intermediate)
    _add_router(writer, experts.router)


def _add_router(writer: gguf.GGUFWriter, router: Router) -> None:
    writer.add_expert_used_count(router.top_k)
    if router.score in IMPLIED_GATING:
        return
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType(_GATING[router.score]))
    writer.add_expert_weights_norm(router.renormalise)
    if router.scale != 1.0 or router.score == "sigmoid":
        writer.add_expert_weights_scale(router.scale)
    if router.groups > 1 or router.score == "sigmoid":
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.top_groups)
