#!/usr/bin/env python3
"""Times one MoE layer of kt-kernel through its extension's own classes, and prints one JSON object.

Started by ``layer`` with kt-kernel's folder on the path. Weights are random; experts are drawn anew for every
token, so that they come from memory. Formats:

    q8_0     GGUF blocks, class MOE (its LLAMAFILE method)
    rawint4  int4 with bfloat16 scales a group of 32, the class its own RAWINT4 method chooses on this CPU
    amxint4  int4 with one scale a row, quantised from bfloat16 by AMXInt4_MOE
    amxint8  int8 with one scale a row, quantised from bfloat16 by AMXInt8_MOE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

GROUP = 32
NUM_ROUTINGS = 509
GGML_Q8_0 = 8
MIN_SAMPLE_S = 0.5


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def pointers(stack: torch.Tensor) -> list[list[int]]:
    """One address an expert, of the one NUMA node."""
    return [[part.data_ptr() for part in stack]]


class Layer:
    """A layer of random experts in one format, ready to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        import kt_kernel  # type: ignore[import-not-found]
        from kt_kernel import kt_kernel_ext

        self.package, self.ext, self.options = kt_kernel, kt_kernel_ext, options
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [options.threads]
        self.cpu = kt_kernel_ext.CPUInfer(pool)
        self._mask = torch.zeros(options.experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            options.experts, options.top_k, options.hidden, options.intermediate, self._mask.data_ptr()
        )
        config.layer_idx, config.pool, config.max_len = 0, self.cpu.backend_, 64
        self._keep: list[torch.Tensor] = []
        kind, self.expert_bytes = {"q8_0": self._q8_0, "rawint4": self._rawint4}.get(
            options.format, self._from_bf16
        )(config)
        self.class_name = kind.__name__
        self.moe = kind(config)
        order = torch.arange(options.experts, dtype=torch.int64)
        self.cpu.submit(self.moe.load_weights_task(order.data_ptr()))
        self.cpu.sync()
        if options.format != "q8_0":  # that class reads the blocks where they are
            self._keep.clear()

    def _shapes(self) -> list[tuple[str, int, int]]:
        o = self.options
        return [
            ("gate", o.intermediate, o.hidden),
            ("up", o.intermediate, o.hidden),
            ("down", o.hidden, o.intermediate),
        ]

    def _q8_0(self, config: Any) -> tuple[Any, int]:
        for name, n, k in self._shapes():
            blocks = random_bytes(self.options.experts, n, k // 32, 34)
            blocks[..., :2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
            self._keep.append(blocks)
            setattr(config, f"{name}_proj", blocks.data_ptr())
            setattr(config, f"{name}_type", GGML_Q8_0)
        config.hidden_type = self.ext.kvcache.ggml_type.BF16
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, 64
        return self.ext.moe.MOE, self._weights() * 34 // 32

    def _rawint4(self, config: Any) -> tuple[Any, int]:
        from kt_kernel.utils import amx  # type: ignore[import-not-found]

        for name, n, k in self._shapes():
            codes = random_bytes(self.options.experts, n, k // 2)
            scales = torch.full((self.options.experts, n, k // GROUP), 0.01, dtype=torch.bfloat16)
            self._keep += [codes, scales]
            setattr(config, f"{name}_projs", pointers(codes))
            setattr(config, f"{name}_scales", pointers(scales))
        quant = config.quant_config
        quant.bits, quant.group_size, quant.zero_point = 4, GROUP, False
        return amx._select_rawint4_backend(GROUP), self._weights() * (4 * GROUP + 16) // (8 * GROUP)

    def _from_bf16(self, config: Any) -> tuple[Any, int]:
        pool = torch.randn(1 << 22).to(torch.bfloat16) * 0.02
        for name, n, k in self._shapes():
            count = self.options.experts * n * k
            weights = pool.repeat(-(-count // len(pool)))[:count].reshape(self.options.experts, n, k)
            self._keep.append(weights)
            setattr(config, f"{name}_proj", weights.data_ptr())
        bits = 4 if self.options.format == "amxint4" else 8
        return getattr(self.ext.moe, f"AMXInt{bits}_MOE"), self._weights() * bits // 8

    def _weights(self) -> int:
        return int(3 * self.options.hidden * self.options.intermediate)


def measure(layer: Layer, repeats: int) -> dict[str, Any]:
    """Tokens/s through the layer, one token a call."""
    o = layer.options
    ids = torch.rand(NUM_ROUTINGS, o.experts).argsort(dim=-1)[:, : o.top_k].contiguous()
    weights = torch.full((1, o.top_k), 1 / o.top_k)
    source = torch.randn(1, o.hidden).to(torch.bfloat16)
    out = torch.zeros(1, o.hidden, dtype=torch.bfloat16)
    batch = torch.tensor([1], dtype=torch.int32)
    rest = (weights.data_ptr(), source.data_ptr(), out.data_ptr(), False)

    def submitted(number: int) -> None:
        task = layer.moe.forward_task(batch.data_ptr(), o.top_k, ids[number % NUM_ROUTINGS].data_ptr(), *rest)
        layer.cpu.submit(task)
        layer.cpu.sync()

    def rate(step: Callable[[int], None], count: int) -> float:
        begin = time.perf_counter()
        for number in range(count):
            step(number)
        return count / (time.perf_counter() - begin)

    rate(submitted, 16)
    count = max(32, int(rate(submitted, 32) * MIN_SAMPLE_S))
    rates = [rate(submitted, count) for _ in range(repeats)]
    if not torch.isfinite(out.float()).all() or not out.float().abs().max() > 0:
        raise RuntimeError("the layer's result is not finite, or zero")
    token_bytes = layer.expert_bytes * o.top_k
    return {
        "tokens_per_s": rates,
        "weights_gbps": [value * token_bytes / 1e9 for value in rates],
        "class": layer.class_name,
        "variant": layer.package.__cpu_variant__,
        "version": layer.package.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("threads", "hidden", "intermediate", "experts", "top-k", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--format", choices=["q8_0", "rawint4", "amxint4", "amxint8"], required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    result = measure(Layer(options), options.repeats)
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
