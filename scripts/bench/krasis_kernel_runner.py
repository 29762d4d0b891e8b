#!/usr/bin/env python3
"""Times krasis_moe alone, one token a call, and prints one JSON object.

Started by ``layer`` beside krasis_layer_runner.py. Activations are quantised already and calls follow each
other with nothing between them, so that only the weights' way from memory counts. Weights are random; every
sample stands between two measurements of the read bandwidth, as in bench_decode.py, whose code this is.
"""

from __future__ import annotations

import argparse
import json

from krasis.formats.native import Pool
from scripts import bench_common, bench_decode
from scripts.bench.layer_work import add_options

SAMPLES_A_REPEAT = 5  # they are short, and the memory of a shared machine changes its speed within seconds
MOST_LAYERS = 256  # of a small model: still beyond any cache
SAMPLE_BYTES = int(bench_decode.SAMPLE_GB * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--format", choices=[*bench_common.TILE_BYTES], required=True)
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    shape = bench_common.LayerShape(
        "layer", options.hidden, options.intermediate, options.experts, options.top_k, num_layers=1
    )
    layer_bytes = shape.num_experts * shape.stride_bytes(options.format)
    least_bytes = min(bench_common.LEAST_STACK_BYTES, MOST_LAYERS * layer_bytes)
    stack = bench_common.ExpertStack(shape, options.format, least_bytes)
    with Pool(options.threads, options.isa) as pool:
        found = bench_decode.measure(pool, stack, SAMPLES_A_REPEAT * options.repeats, SAMPLE_BYTES)
        result = {
            "tokens_per_s": found["tokens_per_s"],
            "weights_gbps": found["decode_gbps"],
            "read_gbps": found["read_gbps"],
            "fraction": found["fraction"],
            "isa": pool.isa,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
