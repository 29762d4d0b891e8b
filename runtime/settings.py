"""What a caller can choose: how the engine runs, and how tokens are picked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from krasis.formats.errors import UsageError
from krasis.runtime.template_values import check_variables

CPU_PREFILL_CHUNK = 512
ISAS = ("auto", "avx2", "avx512_vnni", "amx_int8")
ACTIVATIONS = ("int8", "float32")
EXPERT_TIERS = ("cpu", "gpu")
DEVICES = ("auto", "cpu", "cuda", "double")
GPU_DTYPES = ("bf16", "f16")
KV_DTYPES = ("f16", "f32", "int8")
MAX_THREADS = 4096
MAX_SLOTS = 256
MAX_LAYERS = 10_000
MAX_DRAFTS = 8
MAX_PREFILL_CHUNK = 65536


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"unknown value of {name}", got=value, limit=", ".join(allowed))


def _between(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} is out of range", got=value, limit=f"{low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How to run a bundle. Raises UsageError for a value out of range.

    context: tokens the KV cache holds; None = the model's maximum, or what memory has room for if that is
    less.
    threads: of the CPU kernels; 0 = every CPU of the affinity mask. isa: one of ISAS.
    activations: ``int8`` (the fast kernels) or ``float32`` (a slow reference on dequantised weights).
    experts: tier the experts are taken from; ``gpu`` (the Marlin copy) needs activations ``float32`` on a
    CPU.
    kv_dtype: ``f16``, ``f32`` or ``int8`` (half the memory); a GPU's is ``int8`` or of gpu_dtype.
    prefill_chunk: most tokens computed in one pass (memory, not results, depends on it); None = 512 on a CPU,
    on a GPU as many as the plan finds best.
    prefault: read the weights into memory in the background. reread: from the disk, wherever they are in
    memory before: what ``cp`` left in the page cache is read slower than what comes from the disk.
    device: ``cpu``; ``cuda``: prefill on the GPU, decode on both; ``auto``: the GPU if all it needs is there
    (the log says what is missing); ``double``: the GPU's code on the CPU, checked and slow, for tests.
    rope_scaling: instead of the bundle's own: ``none``, ``linear,FACTOR`` or ``yarn,FACTOR,ORIGINAL``, as
    ``rope_option.parse_rope_scaling`` reads it; None = the bundle's.
    gpu_dtype: of the GPU's activations, and of its KV cache unless that is ``int8``. vram_bytes: use no more
    of a GPU's memory; None = what is free. chat_template: a file whose template takes the place of the
    bundle's. template_vars: what every conversation's chat template is told beside, such as enable_thinking.
    slots: sequences whose state is kept
    at once, each of ``context`` tokens. host_kv_layers: of at least so many layers a GPU's keys and values
    lie in RAM, of which a token reads them over the link; 0 = of as many as VRAM has no room for. draft:
    tokens that the bundle's layer for multi-token prediction guesses ahead of each pass; 0 = none, None = one
    where that pays, if the bundle has such a layer.
    """

    context: int | None = None
    threads: int = 0
    isa: str = "auto"
    activations: str = "int8"
    experts: str = "cpu"
    kv_dtype: str = "f16"
    prefill_chunk: int | None = None
    prefault: bool = True
    reread: bool = False
    device: str = "auto"
    gpu_dtype: str = "bf16"
    vram_bytes: int | None = None
    chat_template: str | None = None
    template_vars: Mapping[str, object] = field(default_factory=dict)
    rope_scaling: str | None = None
    slots: int = 1
    host_kv_layers: int = 0
    draft: int | None = None

    def __post_init__(self) -> None:
        if self.context is not None:
            _between("context", self.context, 1, 2**31 - 1)
        _between("threads", self.threads, 0, MAX_THREADS)
        _between("slots", self.slots, 1, MAX_SLOTS)
        _between("host_kv_layers", self.host_kv_layers, 0, MAX_LAYERS)
        if self.draft is not None:
            _between("draft", self.draft, 0, MAX_DRAFTS)
        if self.prefill_chunk is not None:
            _between("prefill_chunk", self.prefill_chunk, 1, MAX_PREFILL_CHUNK)
        _one_of("isa", self.isa, ISAS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("experts", self.experts, EXPERT_TIERS)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("gpu_dtype", self.gpu_dtype, GPU_DTYPES)
        if self.rope_scaling is not None:
            from krasis.runtime.rope_option import parse_rope_scaling

            parse_rope_scaling(self.rope_scaling)
        if self.vram_bytes is not None:
            _between("vram_bytes", self.vram_bytes, 1, 2**50)
        if self.experts == "gpu" and self.activations == "int8":
            raise UsageError(
                "GPU experts cannot be run by the int8 kernels of the CPU",
                hint='use activations="float32" (slow, for measurements), or experts="cpu"',
            )
        check_variables(self.template_vars)

    def context_for(self, max_positions: int, tokens_that_fit: int | None = None) -> int:
        """The tokens the KV cache shall hold. tokens_that_fit: what memory has room for (``context_size``);
        None = any number. Raises UsageError beyond the model's maximum.
        """
        if self.context is None:
            return max_positions if tokens_that_fit is None else min(max_positions, tokens_that_fit)
        if self.context > max_positions:
            raise UsageError(
                "the context is longer than the model allows",
                got=self.context,
                limit=max_positions,
                hint="--rope-scaling stretches the context of a model that is made for it",
            )
        return self.context

    def cpu_chunk_for(self, capacity: int) -> int:
        """The most tokens of one pass on a CPU."""
        return min(self.prefill_chunk or CPU_PREFILL_CHUNK, capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the next token is picked; see ``sampler.Sampler`` for the order. Raises UsageError when out of
    range.

    temperature: 0 = the most likely token. top_k: 0 = off. top_p: 1 = off. min_p: 0 = off.
    repetition_penalty: 1 = off; applies to tokens of the prompt and of the answer. presence_penalty,
    frequency_penalty: 0 = off; as OpenAI defines them, over the tokens of the answer so far.
    penalty_last_n: all three look at so many of the last tokens only; -1 = at all, 0 = at none.
    seed: None = fresh entropy for every generation.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = -1
    seed: int | None = None

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_k", self.top_k, 0, 2**31 - 1)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _between("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _between("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _between("penalty_last_n", self.penalty_last_n, -1, 2**31 - 1)
        if self.seed is not None:
            _between("seed", self.seed, 0, 2**64 - 1)
