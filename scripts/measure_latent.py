#!/usr/bin/env python3
"""Times both ways of latent attention on this GPU, for the threshold of runtime/planning/latent_workspace.py.

    python -m scripts.measure_latent [--keys 2048,10000] [--rows 1,16,64,512] [--repeats 10]

Absorbed: queries taken to the latents, attention over these, and values of what it gathers, by the kernels of
libkrasis_cuda. Expanded: keys and values made of the latents, then the library's attention. Queries are the
last ones of so many keys. The threshold is where expanding becomes faster for every shape.
"""

from __future__ import annotations

import argparse

import torch

from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.gpu.kernels.attention_rows import CachePlace
from krasis.runtime.gpu.kernels.latent import LatentForm
from krasis.runtime.gpu.kernels.latent_expanded import LatentWeights, attend_expanded
from krasis.runtime.gpu.weights import GpuInt8
from krasis.runtime.planning.latent_workspace import EXPANDED_BYTES, latent_splits, split_bytes
from scripts.measure_many_rows import BF16, Machine, seconds_of

# heads, kv_rank, nope_dim, rope_dim, value_dim
SHAPES = {
    "deepseek-v3": (128, 512, 128, 64, 128),
    "glm-4.7-flash": (20, 512, 192, 64, 256),
    "mistral-small-4": (32, 256, 64, 64, 128),
}


class Layer:
    """A layer's weights and a cache of so many latents."""

    def __init__(self, machine: Machine, name: str, num_keys: int) -> None:
        heads, rank, nope, rope, value = SHAPES[name]
        self.machine, self.num_keys = machine, num_keys
        self.mixer = LatentAttention(
            heads=heads, q_rank=None, kv_rank=rank, nope_dim=nope, rope_dim=rope, value_dim=value, rope=None,
            scale=(nope + rope) ** -0.5,
        )  # fmt: skip
        norm = machine.make((rank,), torch.float32, lambda t: t.fill_(1))
        self.form = LatentForm(self.mixer, norm, None, None)
        self.weights = LatentWeights(
            self._weight(heads * rank, nope, rank), self._weight(heads * value, rank, rank)
        )
        self.cache = machine.make((1, num_keys, rank + rope), BF16, torch.Tensor.normal_)
        self.room = machine.device.empty((EXPANDED_BYTES // 2,), BF16)

    def _weight(self, n: int, k: int, size: int) -> GpuInt8:
        codes = self.machine.make((n // 32, k // 4, 32, 4), torch.int8, lambda t: t.random_(-128, 128))
        return GpuInt8(codes, self.machine.make((n,), torch.float32, lambda t: t.fill_(size**-0.5 / 73)))

    def times(self, rows: int) -> tuple[float, float, float]:
        """Seconds of the absorbed way, of its attention alone, and of the expanded one."""
        machine, mixer, form, start = self.machine, self.mixer, self.form, self.num_keys - rows
        kernels, stream = machine.kernels, machine.stream
        q = machine.make((rows, mixer.heads, form.head_dim), BF16, torch.Tensor.normal_)
        out = machine.make((rows, mixer.heads, mixer.value_dim), BF16, torch.Tensor.zero_)
        queries = machine.make((rows, mixer.heads, mixer.kv_rank), BF16, torch.Tensor.normal_)
        room = split_bytes(rows, mixer.heads, mixer.kv_rank)
        workspace = machine.device.empty((room,), torch.uint8)
        place, splits = (
            CachePlace(self.cache, self.cache, start),
            latent_splits(1, rows * mixer.heads, self.num_keys),
        )
        to_keys, to_values = self.weights.to_keys, self.weights.to_values

        def attention() -> None:
            rest = q[:, :, mixer.nope_dim :]
            kernels.latent_attention(stream, queries, rest, form, place, workspace, splits)

        def absorbed() -> None:
            kernels.int8_heads(stream, q[:, :, : mixer.nope_dim], to_keys.codes, to_keys.scales, queries)
            attention()
            kernels.int8_heads(stream, queries, to_values.codes, to_values.scales, out)

        def expanded() -> None:
            attend_expanded(kernels, stream, form, self.weights, q, self.cache[0], start, out, self.room)

        absorbed_s, attention_s, expanded_s = (
            seconds_of(run, stream, machine.repeats) for run in (absorbed, attention, expanded)
        )
        return absorbed_s, attention_s, expanded_s

    def report(self, name: str, rows: int) -> None:
        """One line: rates of the absorbed attention by the keys once read, and by its multiply-adds."""
        mixer = self.mixer
        absorbed_s, attention_s, expanded_s = self.times(rows)
        pairs = mixer.heads * rows * (self.num_keys - (rows - 1) / 2)
        flops = 2.0 * pairs * (2 * mixer.kv_rank + mixer.rope_dim)
        plain = 2.0 * pairs * (self.form.head_dim + mixer.value_dim)
        read = 2.0 * self.num_keys * self.form.width
        rates = f"{flops / attention_s * 1e-12:.1f} TFLOP/s, {read / attention_s * 1e-9:.0f} GB/s"
        print(
            f"{name:15} {rows:5} rows, {self.num_keys:6} keys: absorbed {absorbed_s * 1e6:9.1f} us "
            f"(attention {attention_s * 1e6:9.1f} us: {rates}), expanded {expanded_s * 1e6:9.1f} us "
            f"{plain / expanded_s * 1e-12:6.1f} TFLOP/s, absorbed / expanded {absorbed_s / expanded_s:.2f}",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512,2048")
    parser.add_argument("--keys", default="2048,10000")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    rows = [int(text) for text in arguments.rows.split(",")]
    machine = Machine(arguments.repeats)
    print(machine.device.description)
    for name in SHAPES:
        for num_keys in (int(text) for text in arguments.keys.split(",")):
            layer = Layer(machine, name, num_keys)
            for count in rows:
                if count <= num_keys:
                    layer.report(name, count)


if __name__ == "__main__":
    main()
