#!/usr/bin/env python3
"""Times one MoE layer of kt-kernel through its extension's own classes, and prints one JSON object.

Started by ``layer`` with kt-kernel's folder on the path. The work, weights included, is that of
krasis_layer_runner.py (see layer_work.py). Formats:

    q8_0          GGUF blocks, class MOE (its LLAMAFILE method)
    rawint4       int4 with bfloat16 scales a group of 32, the class that its RAWINT4 method chooses here
    rawint4-g128  the same with groups of 128
    amxint4       int4 with one scale a row, quantised from bfloat16 by AMXInt4_MOE
    amxint8       int8 with one scale a row, quantised from bfloat16 by AMXInt8_MOE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from scripts.bench.layer_work import MIN_SAMPLE_S, NUM_ROUTINGS, PARTS, LayerWork, add_options

FORMATS = {
    "q8_0": (8, 32),
    "amxint8": (8, 32),
    "rawint4": (4, 32),
    "rawint4-g128": (4, 128),
    "amxint4": (4, 32),
}
GGML_Q8_0 = 8


def pointers(stack: torch.Tensor) -> list[list[int]]:
    """One address an expert, of the one NUMA node."""
    return [[part.data_ptr() for part in stack]]


class Layer:
    """A layer's experts in one format, ready to run."""

    def __init__(self, options: argparse.Namespace, work: LayerWork, max_tokens: int = 64) -> None:
        """max_tokens: the most of one call, for which kt-kernel makes its buffers."""
        import kt_kernel  # type: ignore[import-not-found]
        from kt_kernel import kt_kernel_ext

        self.package, self.ext, self.options, self.work = kt_kernel, kt_kernel_ext, options, work
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [options.threads]
        self.cpu = kt_kernel_ext.CPUInfer(pool)
        self._mask = torch.zeros(options.experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            options.experts, options.top_k, options.hidden, options.intermediate, self._mask.data_ptr()
        )
        config.layer_idx, config.pool, config.max_len = 0, self.cpu.backend_, max_tokens
        self._keep: list[torch.Tensor] = []
        makers = {"q8_0": self._q8_0, "rawint4": self._rawint4, "rawint4-g128": self._rawint4}
        kind, self.expert_bytes = makers.get(options.format, self._from_bf16)(config)
        self.class_name = kind.__name__
        self.moe = kind(config)
        order = torch.arange(options.experts, dtype=torch.int64)
        self.cpu.submit(self.moe.load_weights_task(order.data_ptr()))
        self.cpu.sync()
        if options.format != "q8_0":  # that class reads the blocks where they are
            self._keep.clear()

    def _stack(self, part: str, dtype: torch.dtype, columns: int) -> torch.Tensor:
        """Memory for a matrix of all experts [experts, n, columns], kept while it is needed."""
        stack = torch.empty((self.work.experts, self.work.shape(part)[0], columns), dtype=dtype)
        self._keep.append(stack)
        return stack

    def _q8_0(self, config: Any) -> tuple[Any, int]:
        for part in PARTS:
            blocks = self._stack(part, torch.uint8, self.work.shape(part)[1] // 32 * 34)
            for expert in range(self.work.experts):
                blocks[expert] = torch.from_numpy(self.work.q8_0(expert, part)).flatten(1)
            setattr(config, f"{part}_proj", blocks.data_ptr())
            setattr(config, f"{part}_type", GGML_Q8_0)
        config.hidden_type = self.ext.kvcache.ggml_type.BF16
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, 64
        return self.ext.moe.MOE, self.work.num_weights * 34 // 32

    def _rawint4(self, config: Any) -> tuple[Any, int]:
        from kt_kernel.utils import amx  # type: ignore[import-not-found]

        work, group = self.work, self.work.group
        for part in PARTS:
            k = work.shape(part)[1]
            codes = self._stack(part, torch.uint8, k // 2)
            scales = self._stack(part, torch.bfloat16, k // group)
            for expert in range(work.experts):
                nibbles, own = work.nibbles(expert, part)
                codes[expert], scales[expert] = torch.from_numpy(nibbles), torch.from_numpy(own)
            setattr(config, f"{part}_projs", pointers(codes))
            setattr(config, f"{part}_scales", pointers(scales))
        quant = config.quant_config
        quant.bits, quant.group_size, quant.zero_point = 4, group, False
        return amx._select_rawint4_backend(group), work.num_weights * (4 * group + 16) // (8 * group)

    def _from_bf16(self, config: Any) -> tuple[Any, int]:
        for part in PARTS:
            weights = self._stack(part, torch.bfloat16, self.work.shape(part)[1])
            for expert in range(self.work.experts):
                weights[expert] = torch.from_numpy(self.work.values(expert, part))
            setattr(config, f"{part}_proj", weights.data_ptr())
        bits = self.work.bits
        return getattr(self.ext.moe, f"AMXInt{bits}_MOE"), self.work.num_weights * bits // 8


def measure(layer: Layer, repeats: int) -> dict[str, Any]:
    """Tokens/s through the layer, one token a call."""
    work, top_k = layer.work, layer.work.top_k
    ids = torch.from_numpy(work.routings)
    weights = torch.full((1, top_k), 1 / top_k)
    source = torch.from_numpy(work.token).to(torch.bfloat16)
    out = torch.zeros(1, work.hidden, dtype=torch.bfloat16)
    batch = torch.tensor([1], dtype=torch.int32)
    rest = (weights.data_ptr(), source.data_ptr(), out.data_ptr(), False)

    def submitted(number: int) -> None:
        task = layer.moe.forward_task(batch.data_ptr(), top_k, ids[number % NUM_ROUTINGS].data_ptr(), *rest)
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
    submitted(0)
    token_bytes = layer.expert_bytes * top_k
    return {
        "tokens_per_s": rates,
        "weights_gbps": [value * token_bytes / 1e9 for value in rates],
        "relative_error": [work.error(out.float().numpy())],
        "class": layer.class_name,
        "variant": layer.package.__cpu_variant__,
        "version": layer.package.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--format", choices=[*FORMATS], required=True)
    options = parser.parse_args()
    work = LayerWork(
        options.hidden, options.intermediate, options.experts, options.top_k, *FORMATS[options.format]
    )
    result = measure(Layer(options, work), options.repeats)
    sys.stdout.flush()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
