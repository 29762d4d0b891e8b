"""What a GGUF of Gemma 4 says of its layers, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.models.registry import spec_from_gguf
from krasis.formats.models.rope import RopeScaling


@dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]


KEYS: dict[str, Any] = {
    "block_count": 3,
    "context_length": 512,
    "embedding_length": 128,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": [2, 2, 1],
    "attention.key_length": 512,
    "attention.key_length_swa": 32,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": [True, True, False],
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count_swa": 32,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_feed_forward_length": 64,
    "final_logit_softcapping": 15.0,
}
TENSORS = {
    "token_embd.weight": Shape((320, 128)),
    "rope_freqs.weight": Shape((256,)),
    "blk.0.attn_v.weight": Shape((64, 128)),
    "blk.1.attn_v.weight": Shape((64, 128)),
}


def spec(**changes: Any) -> Any:
    values = KEYS | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"gemma4.{key}": value for key, value in values.items() if value is not None}
    return spec_from_gguf(metadata | {"general.architecture": "gemma4"}, TENSORS)


def test_layers_are_what_they_are_said_to_be() -> None:
    found = spec()
    sliding, full = found.layers[0].mixer, found.layers[2].mixer
    assert (sliding.window, sliding.kv_heads, sliding.head_dim, sliding.shared_kv) == (16, 2, 32, False)
    assert (full.window, full.kv_heads, full.head_dim, full.shared_kv) == (None, 1, 512, True)
    assert (full.rope.dims, full.rope.scaling) == (128, RopeScaling("proportional"))
    assert (sliding.rope.dims, sliding.rope.theta) == (32, 1e4)
    assert (found.logits_cap, found.embedding_scale, found.tied) == (15.0, 128**0.5, True)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"attention__sliding_window_pattern": [True, False]}, FormatError, "sliding_window_pattern.*got 2"),
        ({"attention__sliding_window_pattern": [1, 1, 0]}, FormatError, "array of bool"),
        ({"attention__sliding_window_pattern": "x"}, FormatError, "array of bool"),
        ({"attention__head_count_kv": [2, 2, 3]}, FormatError, "heads do not divide"),
        ({"attention__head_count_kv": [2, 2, True]}, FormatError, "array of int"),
        ({"attention__head_count_kv": [2, 2, 10**30]}, FormatError, "kv_heads"),
        ({"attention__sliding_window": None}, FormatError, "sliding_window"),
        ({"attention__shared_kv_layers": 2}, UnsupportedModelError, "shared_kv_layers"),
        ({"embedding_length_per_layer_input": 256}, UnsupportedModelError, "per_layer_input"),
        ({"expert_count": None}, FormatError, "expert_count"),
        ({"final_logit_softcapping": float("nan")}, FormatError, "softcapping"),
        ({"attention__key_length": 2}, FormatError, "dims"),
    ],
)
def test_unsound_metadata(changes: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        spec(**changes)
