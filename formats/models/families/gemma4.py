"""Gemma 4 (26B-A4B): two head sizes, values that are the keys, an MLP beside the experts, more norms."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import AUDIO, VISION, Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_model
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, num_layers
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Activation, Experts, GatedMlp, MlpBesideExperts, Router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.models.spec import Layer, ModelSpec

NAME = "gemma4"
_WINDOW, _ROPE_FREQS = "attention.sliding_window", "rope_freqs.weight"
_GELU = Activation("gelu_tanh")


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("attention_bias", False)
    config.expect("num_kv_shared_layers", 0)
    config.expect("use_double_wide_mlp", False)
    if config.size("hidden_size_per_layer_input", default=256, least=0):
        raise config.unsupported("hidden_size_per_layer_input", "inputs of each layer", 0)
    if not config.flag("enable_moe_block"):
        raise config.unsupported("enable_moe_block", "a dense model", "true")
    count = num_layers(config)
    known = {"sliding_attention": _sliding(config), "full_attention": _full(config)}
    default = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]
    mlp = MlpBesideExperts(GatedMlp(config.size("intermediate_size"), _GELU), _experts(config))
    layers = [
        Layer(mixer, mlp, post_norms=True, output_scale=True)
        for mixer in config.kinds("layer_types", count, known, default)
    ]
    cap = config.number("final_logit_softcapping") if config.has("final_logit_softcapping") else None
    scale = config.size("hidden_size") ** 0.5
    return model(config, NAME, layers, tied=True, embedding_scale=scale, logits_cap=cap)


def _sliding(config: Config) -> Attention:
    rope = {"layer_kind": "sliding_attention"}
    window = config.size("sliding_window")
    return attention(config, rope=rope, qk_norm="head", value_norm=True, scale=1.0, window=window)


def _full(config: Config) -> Attention:
    shared = config.flag("attention_k_eq_v")
    own = _overrides(config)
    kv_heads = config.size("num_key_value_heads")
    own_kv_heads = own.size("num_key_value_heads", "num_global_key_value_heads", default=kv_heads)
    return attention(
        config,
        rope={"layer_kind": "full_attention", "kinds": ("default", "proportional")},
        head_dim=own.size("head_dim", "global_head_dim", default=512),
        kv_heads=own_kv_heads if shared else kv_heads,
        qk_norm="head",
        value_norm=True,
        scale=1.0,
        shared_kv=shared,
    )


def _overrides(config: Config) -> Config:
    """What full layers have of their own: by layer as transformers 5 writes it, else in fields beside."""
    by_layer = config.child("per_layer_config")
    for name in by_layer.table:
        return by_layer.child(name)
    fields = ("global_head_dim", "num_global_key_value_heads")
    return Config({name: config.table.get(name) for name in fields}, config.where)


def _experts(config: Config) -> Experts:
    router = Router(config.size("top_k_experts"), input_norm=True, expert_scale=True)
    return Experts(config.size("num_experts"), config.size("moe_intermediate_size"), router, _GELU)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Which layers have values of their own is told by their tensors, and
    that a quarter of the pairs of full layers turns by ``rope_freqs``, whose values llama.cpp reads.
    """
    keys.expect("attention.shared_kv_layers", 0)
    keys.expect("embedding_length_per_layer_input", 0)
    count = keys.size("block_count")
    windowed = keys.by_layer("attention.sliding_window_pattern", count, bool)
    kv_heads = keys.by_layer("attention.head_count_kv", count, int)
    mlp = MlpBesideExperts(
        GatedMlp(keys.size("feed_forward_length"), _GELU),
        Experts(
            keys.size("expert_count"),
            keys.size("expert_feed_forward_length"),
            Router(keys.size("expert_used_count"), input_norm=True, expert_scale=True),
            _GELU,
        ),
    )
    layers = [
        Layer(_gguf_attention(keys, i, heads, is_windowed), mlp, post_norms=True, output_scale=True)
        for i, (heads, is_windowed) in enumerate(zip(kv_heads, windowed, strict=True))
    ]
    cap = keys.number("final_logit_softcapping") if keys.has("final_logit_softcapping") else None
    spec = gguf_model(keys, NAME, layers)
    return replace(spec, embedding_scale=spec.hidden**0.5, logits_cap=cap)


def _gguf_attention(keys: Keys, layer: int, kv_heads: int, is_windowed: bool) -> Attention:
    ending = "_swa" if is_windowed else ""
    head_dim = keys.size(f"attention.key_length{ending}")
    theta = keys.number(f"rope.freq_base{ending}", default=10_000.0)
    if is_windowed:
        rope, window = (
            Rope(keys.size("rope.dimension_count_swa", default=head_dim), theta),
            keys.size(_WINDOW),
        )
    elif _ROPE_FREQS in keys.tensors:
        rope, window = Rope(head_dim // 4, theta, scaling=RopeScaling("proportional")), None
    else:
        rope, window = Rope(head_dim, theta), None
    return Attention(
        keys.size("attention.head_count"),
        kv_heads,
        head_dim,
        rope,
        scale=1.0,
        qk_norm="head",
        window=window,
        shared_kv=f"blk.{layer}.attn_v.weight" not in keys.tensors,
        value_norm=True,
    )


def _names() -> dict[str, Source]:
    """On the hub of the language model alone, and within one of pictures and text."""
    names = decoder_names(dense=True)
    norms = {
        "attention.post_norm": ("post_attention_layernorm", "post_attention_norm"),
        "mlp.norm": ("pre_feedforward_layernorm", "ffn_norm"),
        "mlp.own_post_norm": ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
        "mlp.post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
        "experts.norm": ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
        "experts.post_norm": ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        "experts.router": ("router.proj", "ffn_gate_inp"),
    }
    layer, gguf = "model.layers.{i}.", "blk.{i}."
    for ours, (hf, theirs) in norms.items():
        names[ours] = Source((f"{layer}{hf}.weight",), (f"{gguf}{theirs}.weight",))
    names["experts.router.scale"] = Source((f"{layer}router.scale",), (f"{gguf}ffn_gate_inp.scale",))
    expert_scale = f"{layer}router.per_expert_scale"
    names["experts.router.expert_scale"] = Source((expert_scale,), (f"{gguf}ffn_down_exps.scale",))
    names["output_scale"] = Source((f"{layer}layer_scalar",), (f"{gguf}layer_output_scale.weight",))
    found = {}
    for ours, source in names.items():
        alone = tuple(name.replace(".mlp.experts.", ".experts.") for name in source.hf)
        nested = tuple(name.replace("model.", "model.language_model.", 1) for name in alone)
        found[ours] = replace(source, hf=(*alone, *nested))
    return found


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "gemma4_text"),
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    reference="Gemma4ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="gemma4",
    spec_from_gguf=spec_from_gguf,
    nested=(NAME,),
    names=_names(),
    left_out={
        "model.vision_tower.": VISION,
        "model.embed_vision.": VISION,
        "model.audio_tower.": AUDIO,
        "model.embed_audio.": AUDIO,
    },
)
