"""Tiny random Qwen3-MoE models on disk, as Hugging Face folders and GGUFs, with their weights at hand."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from krasis.convert.conversion import Summary, convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.file_ops import FileOps

Floats = npt.NDArray[np.float32]

GGUF_TEMPLATES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """float32 to BF16 bits, round to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    """BF16 bits to float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


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


def write_safetensors(path: Path, tensors: dict[str, tuple[str, npt.NDArray[Any]]]) -> None:
    """A safetensors file: name to (dtype, array)."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def random_blocks(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Random but sane blocks of a type that the gguf package cannot quantise to. [rows, row_bytes]"""
    kind = gguf.GGMLQuantizationType[dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = int(np.prod(shape[:-1]))
    raw = rng.integers(0, 256, (rows, shape[-1] // block, block_bytes), dtype=np.uint8)
    scale = np.float16(0.002).view(np.uint16).astype("<u2").reshape(1).view(np.uint8)
    places = {
        "Q6_K": (block_bytes - 2,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q3_K": (block_bytes - 2,),
        "Q2_K": (80, 82),
    }
    for at in places[dtype]:
        raw[..., at : at + 2] = scale
    return raw.reshape(rows, -1)


@dataclass
class Model:
    """Weights (float32, BF16 values unless a test changes them) and writers of both kinds."""

    shape: Shape
    seed: int = 0
    weights: dict[str, Floats] = field(default_factory=dict)
    blocks: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        if not self.weights:
            for name, shape in self.shape.tensor_shapes().items():
                values = rng.standard_normal(shape).astype(np.float32) * 0.05
                if name.endswith("norm.weight"):
                    values += 1
                self.weights[name] = from_bf16(to_bf16(values))

    def expert(self, layer: int, expert: int, part: str) -> Floats:
        """One expert's matrix."""
        return self.weights[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]

    def with_blocks(self, dtype: str) -> Model:
        """A model whose expert weights are the values of random blocks of ``dtype`` (rounded to BF16)."""
        rng = np.random.default_rng(self.seed + 1)
        weights, blocks = dict(self.weights), {}
        for name, values in self.weights.items():
            if ".experts." in name:
                raw = random_blocks(rng, dtype, values.shape)
                blocks[name] = raw
                exact = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
                weights[name] = from_bf16(to_bf16(exact.reshape(values.shape)))
        return Model(self.shape, self.seed, weights, blocks)

    def write_hf(
        self,
        folder: Path,
        *,
        num_files: int = 2,
        dtype: str = "BF16",
        fused: bool = False,
        tokenizer: bool = True,
    ) -> Path:
        """A checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        encode: dict[str, Callable[[Floats], npt.NDArray[Any]]] = {
            "BF16": to_bf16,
            "F16": lambda v: v.astype(np.float16),
            "F32": lambda v: v,
        }
        tensors = {
            name: (dtype, encode[dtype](values)) for name, values in self.hf_weights(fused=fused).items()
        }
        names = list(tensors)
        pieces = [names[i::num_files] for i in range(num_files)]
        if num_files == 1:
            write_safetensors(folder / "model.safetensors", tensors)
        else:
            weight_map = {}
            for i, piece in enumerate(pieces):
                file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
                write_safetensors(folder / file, {name: tensors[name] for name in piece})
                weight_map |= dict.fromkeys(piece, file)
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.shape.config()))
        if tokenizer:
            (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
            (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
        return folder

    def hf_weights(self, *, fused: bool) -> dict[str, Floats]:
        """Weights by hub name; fused: experts stacked as transformers 5 keeps them in memory."""
        if not fused:
            return self.weights
        out = {name: values for name, values in self.weights.items() if ".experts." not in name}
        for i in range(self.shape.layers):
            experts = range(self.shape.experts)
            gate_up = [np.concatenate([self.expert(i, e, "gate"), self.expert(i, e, "up")]) for e in experts]
            out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.stack(gate_up)
            out[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack(
                [self.expert(i, e, "down") for e in experts]
            )
        return out

    def write_gguf(
        self,
        path: Path,
        *,
        experts: str = "Q8_0",
        dense: str = "Q8_0",
        merged: bool = True,
        split: int = 0,
    ) -> Path:
        """A GGUF; split: tensors a file. Returns the first file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=split)
        s = self.shape
        writer.add_block_count(s.layers)
        writer.add_context_length(512)
        writer.add_embedding_length(s.hidden)
        writer.add_feed_forward_length(2 * s.hidden)
        writer.add_expert_feed_forward_length(s.intermediate)
        writer.add_head_count(s.heads)
        writer.add_head_count_kv(s.kv_heads)
        writer.add_key_length(s.head_dim)
        writer.add_value_length(s.head_dim)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_expert_count(s.experts)
        writer.add_expert_used_count(s.top_k)
        self._add_tensors(writer, experts, dense, merged=merged)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if split:
            return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]
        return path

    def _add_tensors(self, writer: gguf.GGUFWriter, experts: str, dense: str, *, merged: bool) -> None:
        for name, values in self.weights.items():
            if ".experts." in name:
                continue
            layer = name.split(".")[2] if ".layers." in name else None
            ours = GGUF_TEMPLATES[name if layer is None else name.split(".", 3)[3]]
            is_float = values.ndim == 1 or ours == "ffn_gate_inp.weight"
            self._add(
                writer, ours if layer is None else f"blk.{layer}.{ours}", values, "F32" if is_float else dense
            )
        for i in range(self.shape.layers):
            for part in ("gate", "up", "down"):
                names = [
                    f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight" for e in range(self.shape.experts)
                ]
                if merged:
                    values = np.stack([self.weights[name] for name in names])
                    raw = (
                        np.stack([self.blocks[name] for name in names])
                        if experts in ("Q4_K", "Q6_K")
                        else None
                    )
                    self._add(writer, f"blk.{i}.ffn_{part}_exps.weight", values, experts, raw)
                    continue
                for e, name in enumerate(names):
                    raw = self.blocks.get(name) if experts in ("Q4_K", "Q6_K") else None
                    self._add(writer, f"blk.{i}.ffn_{part}.{e}.weight", self.weights[name], experts, raw)

    @staticmethod
    def _add(
        writer: gguf.GGUFWriter,
        name: str,
        values: Floats,
        dtype: str,
        raw: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        kind = gguf.GGMLQuantizationType[dtype]
        if raw is None:
            raw = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)


@pytest.fixture(scope="session")
def model_class() -> type[Model]:
    """For tests that need models of their own."""
    return Model


@pytest.fixture(scope="session")
def shape_class() -> type[Shape]:
    """Likewise shapes."""
    return Shape


@pytest.fixture(scope="session")
def model() -> Model:
    """The usual tiny model."""
    return Model(Shape())


@pytest.fixture(scope="session")
def hf_dir(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint: BF16 in two shards. Read-only: tests that change it make a copy."""
    return model.write_hf(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def q8_gguf(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Q8_0 GGUF."""
    return model.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf")


@dataclass(frozen=True)
class Bundle:
    """A converted bundle with its summary."""

    path: Path
    summary: Summary
    messages: str

    def files(self) -> dict[str, str]:
        """Name to digest of every file."""
        return tree_digests(self.path)


def tree_digests(folder: Path) -> dict[str, str]:
    """Name to digest of every file in a folder."""
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(folder.iterdir())}


def run_conversion(
    paths: list[Path], out: Path, io: FileOps | None = None, verbosity: int = 0, **settings: Any
) -> Bundle:
    """Prepares and converts in this process."""
    stream = StringIO()
    reporter = Reporter(verbosity, stream)
    prepared = prepare(paths, out, ConvertSettings(**settings), reporter)
    return Bundle(out, convert(prepared, reporter, io), stream.getvalue())


@pytest.fixture(scope="session")
def run() -> Callable[..., Bundle]:
    """``run(paths, out, io=None, **settings)``."""
    return run_conversion


@pytest.fixture(scope="session")
def digests_of() -> Callable[[Path], dict[str, str]]:
    """``tree_digests``."""
    return tree_digests


@pytest.fixture(scope="session")
def bundle(hf_dir: Path, q8_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The usual model converted with the usual settings. Read-only."""
    return run_conversion([hf_dir, q8_gguf], tmp_path_factory.mktemp("bundle") / "tiny.krasis")


@pytest.fixture
def fast_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of times."""
    shared = Path("/dev/shm")  # noqa: S108
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="krasis-test-") as folder:
        yield Path(folder)
