#!/usr/bin/env python3
"""Times krasis_moe on one layer's shape, one token a call, as bench_decode does; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_common
import bench_decode

from krasis.formats.native import Pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("threads", "hidden", "intermediate", "experts", "top-k", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--format", choices=["q8", "i4"], required=True)
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    shape = bench_common.LayerShape(
        "layer", options.hidden, options.intermediate, options.experts, options.top_k, 1
    )
    stack = bench_common.ExpertStack(shape, options.format, bench_common.LEAST_STACK_BYTES)
    with Pool(options.threads, options.isa) as pool:
        samples = bench_decode.measure(pool, stack, options.repeats, int(bench_decode.SAMPLE_GB * 1e9))
        isa = pool.isa
    stack.close()
    result = {name: samples[name] for name in ("tokens_per_s", "read_gbps", "fraction")}
    print(json.dumps({**result, "weights_gbps": samples["decode_gbps"], "isa": isa}))


if __name__ == "__main__":
    main()
