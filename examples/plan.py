"""Compares machines for a model that is not there: no GPU, no weights, nothing is allocated.

python examples/plan.py
"""

from __future__ import annotations

from krasis.formats.errors import ResourceError
from krasis.runtime.planning import describe_gpu, describe_host, make_plan, make_workload, sizes_of_shape
from krasis.runtime.planning.hardware import given
from krasis.runtime.planning.presets import SHAPES, shape

GIB = 1 << 30
MACHINES = {"no GPU": (), "1 x 16 GiB": (16,), "3 x 16 GiB": (16, 16, 16), "1 x 80 GiB": (80,)}


def main() -> None:
    """Prints the expected seconds for a prompt of 10,000 tokens, or of what a model has positions for, and
    tokens a second after it.
    """
    for name in SHAPES:
        model = shape(name)
        sizes = sizes_of_shape(model)
        for machine, vram_gib in MACHINES.items():
            gpus = tuple(describe_gpu(size * GIB) for size in vram_gib)
            host = describe_host(gpus, ram_bytes=given(1024 * GIB), num_cores=given(64))
            try:
                plan = make_plan(sizes, host, make_workload(model))
            except ResourceError as error:  # it does not fit; the message has the figures
                print(f"{name:16} {machine:12} {error}")
                continue
            rates = f"prompt {plan.prefill.total_s:7.1f} s, {plan.decode.tokens_per_s:5.1f} tok/s"
            print(f"{name:16} {machine:12} {rates}")


if __name__ == "__main__":
    main()
