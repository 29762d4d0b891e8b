"""Small files of every format, built by hand: sound ones, and the pieces that unsound ones are made of."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from krasis.formats.architecture import Architecture, from_hf_config
from krasis.formats.bundle.blob_names import blob_names
from krasis.formats.bundle.manifest import AssetRecord, Manifest, SourceRecord
from krasis.formats.bundle.writer import BlobSpec, BundleWriter, FileOps, ShardPlan, plan_shards
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.uniform import spec_of

# ---- config.json -------------------------------------------------------------------------------------------


def hf_config(**changes: Any) -> dict[str, Any]:
    """A config.json as released checkpoints have it; a change to ``...`` removes the field."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 100,
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def architecture() -> Architecture:
    """That of ``hf_config``."""
    return from_hf_config(hf_config(), "config.json")


def model() -> ModelSpec:
    """The same as a ``ModelSpec``."""
    return spec_of(architecture())


# ---- safetensors -------------------------------------------------------------------------------------------


def safetensors(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, sound or not. length: what the length field says, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors_of(
    arrays: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A sound file. arrays: name -> (safetensors dtype, array)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, (dtype, array) in arrays.items():
        raw = array.tobytes()
        header[name] = tensor_entry(dtype, array.shape, len(data), len(data) + len(raw))
        data += raw
    return safetensors(header, data)


# ---- GGUF --------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}
Q8_0_TYPE, F32_TYPE = 8, 0


def gguf_string(text: str | bytes) -> bytes:
    """u64 length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind: int, value: Any) -> bytes:
    """A value without its type. An ARRAY's value is (item type, list)."""
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(gguf_value(item, each) for each in values)
    return struct.pack("<" + _FORMS[kind], value)


def gguf_pair(key: str | bytes, kind: int, value: Any) -> bytes:
    """A metadata pair."""
    return gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)


def gguf_record(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor's record; dims fastest first."""
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@dataclass
class Gguf:
    """A GGUF file whose every part can be replaced by an unsound one. Counts default to the truth."""

    pairs: list[bytes] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    num_tensors: int | None = None
    num_pairs: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        """The file's bytes."""
        num_tensors = len(self.records) if self.num_tensors is None else self.num_tensors
        num_pairs = len(self.pairs) if self.num_pairs is None else self.num_pairs
        head = self.magic + self.version + struct.pack("<QQ", num_tensors, num_pairs)
        head += b"".join(self.pairs) + b"".join(self.records)
        return head + bytes(-len(head) % self.alignment) + self.data


QWEN3MOE_PAIRS: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "qwen3moe"),
    "qwen3moe.block_count": (U32, 2),
    "qwen3moe.context_length": (U32, 512),
    "qwen3moe.embedding_length": (U32, 64),
    "qwen3moe.attention.head_count": (U32, 4),
    "qwen3moe.attention.head_count_kv": (U32, 2),
    "qwen3moe.attention.key_length": (U32, 32),
    "qwen3moe.attention.value_length": (U32, 32),
    "qwen3moe.attention.layer_norm_rms_epsilon": (F32, 2.0**-20),
    "qwen3moe.rope.freq_base": (F32, 1_000_000.0),
    "qwen3moe.expert_count": (U32, 4),
    "qwen3moe.expert_used_count": (U32, 2),
    "qwen3moe.expert_feed_forward_length": (U32, 64),
}


def qwen3moe_pairs(**changes: Any) -> list[bytes]:
    """Metadata pairs of a small model. changes: key with '__' for '.' -> (type, value), or ... to remove."""
    pairs = dict(QWEN3MOE_PAIRS)
    for key, value in changes.items():
        pairs[key.replace("__", ".")] = value
    return [gguf_pair(key, *value) for key, value in pairs.items() if value is not ...]


def small_gguf() -> Gguf:
    """Two tensors: F32 [100, 64] and Q8_0 [2, 32]."""
    embedding = np.arange(6400, dtype="<f4").tobytes()
    return Gguf(
        pairs=qwen3moe_pairs(),
        records=[
            gguf_record("token_embd.weight", [64, 100], F32_TYPE, 0),
            gguf_record("blocks", [32, 2], Q8_0_TYPE, len(embedding)),
        ],
        data=embedding + bytes(range(68)),
    )


# ---- bundles -----------------------------------------------------------------------------------------------

SPECS = (
    BlobSpec("embedding", "dense", "BF16", (100, 64), "plain"),
    BlobSpec("layers.0.attention.qkv.scale", "dense", "F32", (256,), "plain"),
    BlobSpec("layers.0.attention.norm", "dense", "F16", (64,), "plain"),
    BlobSpec("layers.0.experts.gpu", "gpu", "U8", (4, 8192), "marlin-u4b8-g32-bf16"),
    BlobSpec("layers.0.experts.cpu", "cpu", "U8", (4, 12288), "cpu-q8-r32-b32"),
    BlobSpec("layers.1.experts.cpu", "cpu", "U8", (4, 12288), "cpu-q8-r32-b32"),
    BlobSpec("layers.1.experts.gpu", "gpu", "U8", (4, 8192), "marlin-u4b8-g32-bf16"),
    *(
        BlobSpec(name, "dense", "F32", (16,), "plain")
        for name in blob_names(model(), ())
        if name not in ("embedding", "layers.0.attention.qkv.scale", "layers.0.attention.norm")
    ),
)
LAYOUTS = {"gpu": "marlin-u4b8-g32-bf16", "cpu": "cpu-q8-r32-b32"}
ASSETS = {"tokenizer.json": b'{"version": "1.0"}' * 50, "config.json": json.dumps(hf_config()).encode()}


def blob_data(spec: BlobSpec) -> np.ndarray:
    """uint8 [num_bytes], the same for the same name."""
    seed = sum(spec.name.encode())
    data = np.random.default_rng(seed).integers(0, 256, spec.num_bytes, dtype=np.uint8)
    data[data == 128] = 127  # no packer writes the code -128
    return data


def manifest_of(plan: ShardPlan, digests: Mapping[str, str], assets: Iterable[AssetRecord]) -> Manifest:
    """The manifest of a test bundle."""
    return Manifest(
        tool_version="0.0.test",
        spec=model(),
        layouts=LAYOUTS,
        files=plan.file_records(),
        blobs=plan.blob_records(digests),
        assets=tuple(assets),
        sources=(SourceRecord("model.safetensors", "safetensors", 12345, "xxh3_128:00"),),
        recipe={"gpu": {"bits": 4, "group": 32}},
        quality={"experts.gpu": 0.0094},
    )


def write_partial(partial: Path, io: FileOps | None = None) -> tuple[BundleWriter, Manifest]:
    """Everything up to ``finish``."""
    plan = plan_shards(SPECS)
    writer = BundleWriter(partial, plan, io=io)
    writer.create()
    digests = {}
    for spec in SPECS:
        with writer.open_blob(spec.name) as sink:
            sink.write(blob_data(spec))
            digests[spec.name] = sink.close()
    assets = [writer.write_asset(name, data) for name, data in ASSETS.items()]
    return writer, manifest_of(plan, digests, assets)


def write_bundle(final: Path, io: FileOps | None = None) -> Path:
    """A small complete bundle at ``final``."""
    writer, manifest = write_partial(final.with_name(final.name + ".partial"), io)
    with writer:
        writer.finish(manifest, final)
    return final
