"""Random checkpoints with a tokenizer, and bundles made of them by the converter."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ASSETS = Path(__file__).parent.parent / "assets"


def config_json(**changes: Any) -> dict[str, Any]:
    """config.json as the hub has it, of a small model."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 300,
        **changes,
    }


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hub names to shapes."""
    h, d, inner = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
            "mlp.gate": (config["num_experts"], h),
        }
        for expert in range(config["num_experts"]):
            for part, shape in (("gate", (inner, h)), ("up", (inner, h)), ("down", (h, inner))):
                layer[f"mlp.experts.{expert}.{part}_proj"] = shape
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    return shapes


def write_checkpoint(
    folder: Path, config: dict[str, Any], seed: int = 0, tokenizer: bytes | None = None
) -> Path:
    """Random BF16 weights of about the size trained ones have; with a tokenizer, a chat model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        mean, scale = (1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.8 / shape[-1] ** 0.5)
        if name == "model.embed_tokens.weight":
            scale = 0.5
        if name.endswith("mlp.gate.weight"):
            # Trained routers decide; a random one of this size has near-ties, and the least rounding of an
            # activation
            # then picks another expert, which says nothing about the arithmetic.
            scale = 4.0 / shape[-1] ** 0.5
        tensors[name] = (torch.randn(shape, generator=random).mul_(scale).add_(mean)).to(torch.bfloat16)
    if tokenizer is not None and "lm_head.weight" in tensors:
        # An average logit is never among the most likely: an answer goes on until it is stopped.
        end = next(
            one["id"] for one in json.loads(tokenizer)["added_tokens"] if one["content"] == "<|im_end|>"
        )
        tensors["lm_head.weight"][end] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
        tokens = {
            "eos_token": "<|im_end|>",
            "chat_template": CHAT_TEMPLATE,
            "tokenizer_class": "Qwen2Tokenizer",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
        generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def convert(sources: list[Path], out: Path, **settings: Any) -> Path:
    """The bundle krasis-convert makes of the sources."""
    from krasis.convert.conversion import convert as run
    from krasis.convert.conversion import prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    reporter = Reporter(0)
    run(prepare(sources, out, ConvertSettings(num_threads=2, **settings), reporter), reporter)
    return out


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(config, seed, tokenizer, **convert settings) -> a bundle of a random checkpoint."""

    def make(
        config: dict[str, Any], *, seed: int = 0, tokenizer: bytes | None = None, **settings: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("bundle")
        checkpoint = write_checkpoint(folder / "hf", config, seed, tokenizer)
        return convert([checkpoint], folder / "model.krasis", **settings)

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., dict[str, Any]]:
    """A small config.json with changes."""
    return config_json


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model's bundle."""
    checkpoint = ASSETS / "tiny-qwen3-moe"
    if not (checkpoint / "config.json").exists():
        pytest.skip("the trained model is not there")
    return convert([checkpoint], tmp_path_factory.mktemp("trained") / "tiny.krasis")


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """tokenizer.json of a byte-level BPE of 258 tokens and more: any text has tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(["def main() -> None: return the quick brown fox"] * 3, trainer=trainer)
    library.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    return library.to_str().encode()


@pytest.fixture(scope="session")
def chat_bundle(make_bundle: Callable[..., Path], tokenizer_json: bytes) -> Path:
    """A random model that chats nonsense."""
    return make_bundle(config_json(max_position_embeddings=32768), tokenizer=tokenizer_json)


@pytest.fixture
def random_tokens() -> Callable[[int, int], list[int]]:
    """(count, vocab) -> token ids, always the same."""

    def tokens(count: int, vocab: int) -> list[int]:
        return np.random.default_rng(11).integers(0, vocab, count).tolist()

    return tokens


# ---- the GPU backend on the device's double -----------------------------------------------


@pytest.fixture(scope="session")
def gpu_kind() -> str:
    """``double``, or ``cuda`` if $KRASIS_TEST_DEVICE says so: the same tests on a real GPU.

    Skips where the double was not built and nobody said it was.
    """
    from krasis.formats.errors import NativeError
    from krasis.runtime.device.library import double_library

    if os.environ.get("KRASIS_TEST_DEVICE") == "cuda":
        return "cuda"
    try:
        double_library()
    except NativeError as error:
        if "KRASIS_CUDA_DOUBLE" in os.environ:
            raise
        pytest.skip(str(error))
    return "double"


@pytest.fixture
def only_double(gpu_kind: str) -> None:
    """For tests of what only the double finds."""
    if gpu_kind != "double":
        pytest.skip("this is about the double of a GPU")


@pytest.fixture
def vram_for() -> Callable[..., int]:
    """(bundle, context, group_experts=, resident=0) -> bytes of VRAM for which the plan makes such groups.

    With resident, a layer is one group and so many experts have a place for good.
    """
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.planning import assumptions, sizes_of_bundle
    from krasis.runtime.planning.placement import gpu_workspace_bytes

    def vram_bytes(bundle: Path, context: int, *, group_experts: int, resident: int = 0) -> int:
        with Bundle.open(bundle) as opened:
            sizes = sizes_of_bundle(opened.manifest)
        fixed = assumptions.GPU_RESERVE_BYTES + sizes.dense_bytes + sizes.kv_bytes(context, "bf16")
        experts = (2 * group_experts + resident) * sizes.gpu_expert_bytes
        return fixed + gpu_workspace_bytes(sizes.spec, context, 1) + experts

    return vram_bytes


@pytest.fixture
def only_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The cost model finds this path the fastest."""
    from krasis.runtime.gpu.experts.paths import PathModel

    def choose(path: str) -> None:
        monkeypatch.setattr(PathModel, "seconds", lambda self, name, *_: 0.0 if name == path else 1.0)

    return choose


@pytest.fixture
def open_gpu(gpu_kind: str) -> Iterator[Callable[..., Any]]:
    """(bundle, seed=, policy=, device=, **settings) -> an engine on a double of a GPU, or on one."""
    from krasis.runtime import Engine, EngineSettings
    from krasis.runtime.device.double import DeviceDouble
    from krasis.runtime.gpu.backend import GpuBackend

    def make_device(seed: int, policy: str | None, vram_bytes: int) -> Any:
        if gpu_kind == "double":
            return DeviceDouble(seed=seed, policy=policy, total_bytes=vram_bytes)
        from krasis.runtime.device.cuda import CudaDevice

        return CudaDevice(0)

    with ExitStack() as closing:

        def open_engine(
            bundle: Path, *, seed: int = 0, policy: str | None = None, device: Any = None, **settings: Any
        ) -> Any:
            used = device or make_device(seed, policy, settings.get("vram_bytes") or 2**30)
            closing.callback(used.close)
            chosen = EngineSettings(device=gpu_kind, threads=2, prefault=False, **settings)
            engine = Engine.open(bundle, chosen, make_backend=lambda b, s: GpuBackend(b, s, used))
            return closing.enter_context(engine)

        yield open_engine


@pytest.fixture
def chat_bundle_copy(chat_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``chat_bundle`` to break."""
    return Path(shutil.copytree(chat_bundle, tmp_path / "broken.krasis"))


@pytest.fixture
def checkpoint_copy(tmp_path: Path, tokenizer_json: bytes) -> Path:
    """A checkpoint to break: one file of weights."""
    return write_checkpoint(tmp_path / "hf", config_json(), tokenizer=tokenizer_json)
