"""What every stage is told: where to work, on which device, at which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of a model's shape. name: of ``model_shapes.BUNDLE_SHAPES``. changes: other sizes of it, for
    small runs. cpu_format: of the experts; mxfp4 is the GPU's, too.
    """

    label: str
    name: str
    max_layers: int
    changes: dict[str, int]
    cpu_format: str = "q8"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each stage does. families: few layers of other families. copy_bytes: of one timed copy.
    matmul_size: of a timed square product.

    gemm_rows: rows an expert. decode_prompt: tokens before decoding. disk_bytes: of a bundle on disk.
    """

    stacks: tuple[Stack, ...]
    families: tuple[Stack, ...]
    prompt_tokens: int
    decode_prompt: int
    decode_tokens: int
    repeats: int
    copy_bytes: int
    matmul_size: int
    gemm_rows: tuple[int, ...]
    gemm_experts: int
    survey_bytes: int
    disk_bytes: int
    pool_bytes: int

    def stack(self, label: str) -> Stack:
        """A stack by its label."""
        return next(one for one in self.stacks if one.label == label)


REAL = Sizes(
    stacks=(
        Stack("30b", "qwen3-30b-a3b", 48, {}),
        Stack("235b", "qwen3-235b-a22b", 94, {}),
    ),
    families=(
        Stack("qwen3.5-35b-a3b", "qwen3.5-35b-a3b", 20, {}),
        Stack("gpt-oss-20b", "gpt-oss-20b", 24, {}, "mxfp4"),
        Stack("glm-4.5-air", "glm-4.5-air", 9, {}),
        Stack("deepseek-v3", "deepseek-v3", 4, {"first_k_dense_replace": 1}),
    ),
    prompt_tokens=10_000,
    decode_prompt=2_000,
    decode_tokens=128,
    repeats=5,
    copy_bytes=GIB,
    matmul_size=8192,
    gemm_rows=(64, 128, 256, 512, 1024, 2048),
    gemm_experts=128,
    survey_bytes=256 * 2**20,
    disk_bytes=16 * GIB,
    pool_bytes=64 * 2**20,
)
_SMALL = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}
_FEW = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
_FEW |= {"num_attention_heads": 2, "vocab_size": 4096}
TINY = Sizes(
    stacks=(
        Stack("30b", "qwen3-30b-a3b", 4, _SMALL),
        Stack("235b", "qwen3-235b-a22b", 4, {**_SMALL, "hidden_size": 256}),
    ),
    families=(
        Stack(
            "qwen3.5-35b-a3b",
            "qwen3.5-35b-a3b",
            4,
            {
                **_FEW,
                "num_key_value_heads": 1,
                "shared_expert_intermediate_size": 128,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
            },
        ),
        Stack("gpt-oss-20b", "gpt-oss-20b", 4, {**_FEW, "num_key_value_heads": 1}, "mxfp4"),
    ),
    prompt_tokens=40,
    decode_prompt=12,
    decode_tokens=3,
    repeats=1,
    copy_bytes=2**20,
    matmul_size=64,
    gemm_rows=(1, 20),
    gemm_experts=4,
    survey_bytes=2**21,
    disk_bytes=2**20,
    pool_bytes=2**20,
)
SIZES = {"real": REAL, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Context:
    """folder: all that is made lies there. device: ``cuda`` or ``double``. size: of ``SIZES``. wheels: folder
    of carried wheels. ram_bytes: what bundles in RAM may take; None: by what is available.
    """

    folder: Path
    device: str = "cuda"
    size: str = "real"
    wheels: Path = REPOSITORY / ".whl"
    ram_bytes: int | None = None

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.size]

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def site(self) -> Path:
        """Where Krasis is installed."""
        return self.folder / "site"

    @property
    def wheel_site(self) -> Path:
        """Where carried wheels are installed."""
        return self.folder / "wheels"
