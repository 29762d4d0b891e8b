"""What bench_decode and bench_prefill share: experts in memory, random routing, krasis_moe, statistics."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.reader import Bundle
from krasis.formats.files.aligned import aligned_empty
from krasis.formats.layouts.cpu_tiles import TILE_BYTES, TILE_ROWS
from krasis.formats.layouts.native_pack import TILE_CODES
from krasis.formats.limits import HUGE_PAGE_BYTES
from krasis.formats.native import Pool, check
from krasis.runtime.cpu.native import ActsStruct, MoeArgs, prototype

RECORD_ALIGNMENT_BYTES = 4096
INSTRUCTION_SETS = ("avx2", "avx512_vnni", "amx_int8")  # each CPU has those before its best
LEAST_STACK_BYTES = 2 << 30  # far beyond any cache
BANDWIDTH_WINDOW_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The expert part of one layer."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    num_layers: int  # of the stack that tokens per second are given for

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def expert_bytes(self, tiles: str) -> int:
        """Bytes of one expert's tiles, without padding."""
        return self.expert_weights // (TILE_ROWS * TILE_ROWS) * TILE_BYTES[tiles]

    def stride_bytes(self, tiles: str) -> int:
        """Bytes from one expert to the next."""
        return -(-self.expert_bytes(tiles) // RECORD_ALIGNMENT_BYTES) * RECORD_ALIGNMENT_BYTES


SHAPES = {
    "qwen3-30b-a3b": LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8, 4),
    "qwen3-235b-a22b": LayerShape("qwen3-235b-a22b", 4096, 1536, 128, 8, 2),
    "gpt-oss-20b": LayerShape("gpt-oss-20b", 2880, 2880, 32, 4, 2),
    "tiny": LayerShape("tiny", 128, 64, 8, 2, 2),  # for tests of the script itself
}


class ExpertStack:
    """Experts of several layers in one piece of anonymous memory with huge pages, or in a bundle's mapping.

    Values are random codes with small scales; experts start at different places of a block of random tiles.
    """

    def __init__(self, shape: LayerShape, tiles: str, least_bytes: int, bundle: Bundle | None = None) -> None:
        self.shape, self.tiles = shape, tiles
        self.layer_bytes = shape.num_experts * shape.stride_bytes(tiles)
        self._memory: npt.NDArray[np.uint8] | None = None
        if bundle is not None:
            bundle.prefault("cpu", os.cpu_count() or 1)
            self.layers = [
                address_of(bundle.map(f"layers.{i}.experts.cpu"))
                for i in range(bundle.architecture.num_layers)
            ]
            return
        num_layers = max(shape.num_layers, -(-least_bytes // self.layer_bytes))
        num_bytes = num_layers * self.layer_bytes
        self._memory = aligned_empty(max(num_bytes, HUGE_PAGE_BYTES))  # at a huge page whatever the size
        self._fill(self._memory[:num_bytes])
        first = address_of(self._memory)
        self.layers = [first + i * self.layer_bytes for i in range(num_layers)]

    @property
    def num_layers(self) -> int:
        """Layers that exist in memory."""
        return len(self.layers)

    def _fill(self, array: npt.NDArray[np.uint8]) -> None:
        rng = np.random.default_rng(1)
        tile_bytes, expert_bytes = TILE_BYTES[self.tiles], self.shape.expert_bytes(self.tiles)
        spare_tiles = 257
        base = rng.integers(0, 256, (expert_bytes // tile_bytes + spare_tiles, tile_bytes), np.uint8)
        if self.tiles == "mxfp4":
            base[:, -TILE_ROWS:] = rng.integers(119, 121, (len(base), TILE_ROWS))  # 2^-8, 2^-7
        else:
            scales = rng.uniform(0.002, 0.004, (len(base), TILE_ROWS)).astype(np.float16)
            base[:, -2 * TILE_ROWS :] = scales.view(np.uint8)
        flat = base.reshape(-1)
        for expert, begin in enumerate(range(0, len(array), self.shape.stride_bytes(self.tiles))):
            offset = expert % spare_tiles * tile_bytes
            array[begin : begin + expert_bytes] = flat[offset : offset + expert_bytes]

    def close(self) -> None:
        """Gives the memory back."""
        self._memory = None  # the mapping goes with the last array over it


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the first element lies, also for read-only arrays."""
    return int(array.__array_interface__["data"][0])


class MoeBatch:
    """Random int8 activations of `tokens` tokens, several random routings, and the buffers of a call."""

    def __init__(self, shape: LayerShape, tokens: int, num_routings: int, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.tokens = shape, tokens
        self._q = aligned((tokens, shape.hidden), np.int8)
        self._q[:] = rng.integers(-127, 128, self._q.shape)
        self._sums = self._q.reshape(tokens, -1, 32).sum(-1, dtype=np.int32)
        self._scales = np.full(self._sums.shape, 0.01, np.float32)
        self._acts = ActsStruct(
            address_of(self._q), address_of(self._scales), address_of(self._sums), tokens, shape.hidden
        )
        order = rng.random((num_routings, tokens, shape.num_experts)).argsort(-1)
        self.routings = np.ascontiguousarray(order[..., : shape.top_k].astype(np.int32))
        self._weights = np.full((tokens, shape.top_k), 1 / shape.top_k, np.float32)
        self._out = np.zeros((tokens, shape.hidden), np.float32)
        workspace_bytes = prototype("krasis_moe_workspace_bytes")(
            tokens, shape.hidden, shape.intermediate, shape.num_experts, shape.top_k
        )
        self._workspace = aligned((workspace_bytes,), np.uint8)
        self._executed = ctypes.c_int64()
        self._calls = 0

    def arguments(self, stack: ExpertStack, layer: int) -> MoeArgs:
        """A call for that layer with the next routing."""
        routing = self.routings[self._calls % len(self.routings)]
        self._calls += 1
        shape = self.shape
        return MoeArgs(
            stack.layers[layer],
            shape.stride_bytes(stack.tiles),
            TILE_CODES[stack.tiles],
            0,
            shape.num_experts,
            shape.hidden,
            shape.intermediate,
            shape.top_k,
            ctypes.addressof(self._acts),
            address_of(routing),
            address_of(self._weights),
            address_of(self._out),
            address_of(self._workspace),
            len(self._workspace),
            ctypes.addressof(self._executed),
        )

    def run(self, pool: Pool, calls: Sequence[MoeArgs]) -> float:
        """Seconds for the calls. Raises RuntimeError unless every (token, expert) pair was computed."""
        moe = prototype("krasis_moe")
        self._executed.value = 0
        self._out[:] = 0
        pointers = [ctypes.addressof(call) for call in calls]
        handle = pool.handle
        start = time.perf_counter()
        for pointer in pointers:
            check(moe(handle, pointer), "krasis_moe")
        elapsed = time.perf_counter() - start
        expected = len(calls) * self.tokens * self.shape.top_k
        if self._executed.value != expected or not np.isfinite(self._out).all():
            got = self._executed.value
            raise RuntimeError(f"{got} of {expected} pairs computed, or a result is not finite")
        return elapsed


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros at an address that is a multiple of 64."""
    kind = np.dtype(dtype)
    num_bytes = int(np.prod(shape)) * kind.itemsize
    raw = np.zeros(num_bytes + 64, np.uint8)
    skip = -address_of(raw) % 64
    return raw[skip : skip + num_bytes].view(kind).reshape(shape)


class BandwidthMeter:
    """Reads windows of a stack, one after another, so that nothing is still in a cache."""

    def __init__(self, pool: Pool, stack: ExpertStack) -> None:
        self._pool, self._stack, self._next = pool, stack, 0
        self._window_bytes = min(BANDWIDTH_WINDOW_BYTES, stack.layer_bytes)

    def gbps(self) -> float:
        """Read bandwidth in GB/s, measured now."""
        windows_a_layer = max(self._stack.layer_bytes // self._window_bytes, 1)
        layer, window = divmod(self._next % (windows_a_layer * self._stack.num_layers), windows_a_layer)
        self._next += 1
        address = self._stack.layers[layer] + window * self._window_bytes
        seconds = ctypes.c_double()
        read = prototype("krasis_read_bandwidth")
        status = read(self._pool.handle, address, self._window_bytes, ctypes.byref(seconds))
        check(status, "krasis_read_bandwidth")
        return self._window_bytes / seconds.value / 1e9


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def split_list(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    """A click callback: comma-separated text."""
    return [part.strip() for part in value.split(",") if part.strip()]


def thread_counts(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    """A click callback: comma-separated positive numbers."""
    try:
        counts = [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter("wants numbers such as 1,2") from error
    if min(counts) < 1:
        raise click.BadParameter("wants at least one thread")
    return counts


def instruction_sets(choice: str) -> list[str]:
    """The sets to measure: the one named, or all that this CPU has."""
    if choice != "all":
        return [choice]
    with Pool(1) as pool:
        return list(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(pool.isa) + 1])


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both scripts."""
    path = click.Path(path_type=Path)
    isas, formats = click.Choice(["all", *INSTRUCTION_SETS]), click.Choice(["both", *TILE_BYTES])
    for option in (
        click.option("--json", "json_path", type=path, help="Write all samples there."),
        click.option("--repeats", default=15, show_default=True, type=click.IntRange(1), help="Samples."),
        click.option("--threads", default="1,2", show_default=True, callback=thread_counts),
        click.option("--isa", default="all", show_default=True, type=isas),
        click.option("--format", "formats", default="both", show_default=True, type=formats),
        click.option("--layers", default=0, help="Layers of the stack; 0: 4 of 30B, 2 of 235B."),
        click.option(
            "--shape",
            "shapes",
            default="qwen3-30b-a3b,qwen3-235b-a22b",
            show_default=True,
            callback=split_list,
            help=f"Of {', '.join(SHAPES)}.",
        ),
        click.option(
            "--bundle",
            "bundle_path",
            type=click.Path(path_type=Path, exists=True),
            help="Take the CPU experts of this bundle instead of random ones.",
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Case:
    """One expert stack to measure."""

    shape: LayerShape
    tiles: str
    bundle: Bundle | None = None

    def stack(self) -> ExpertStack:
        """Allocates and fills it (or maps the bundle)."""
        least = 0 if self.shape.name == "tiny" else LEAST_STACK_BYTES
        return ExpertStack(self.shape, self.tiles, least, self.bundle)


def cases(shapes: Sequence[str], layers: int, formats: str, bundle_path: Path | None) -> list[Case]:
    """The stacks that the options ask for. Raises click.ClickException for a shape or layout not known."""
    if bundle_path is not None:
        bundle = Bundle.open(bundle_path)
        arch = bundle.architecture
        shape = LayerShape(
            bundle_path.name,
            arch.hidden_size,
            arch.expert_intermediate_size,
            arch.num_experts,
            arch.num_experts_per_token,
            arch.num_layers,
        )
        layout = bundle.manifest.layouts["cpu"]
        tiles = {f"cpu-{name}-r32-b32": name for name in TILE_BYTES}.get(layout)
        if tiles is None:
            raise click.ClickException(f"{bundle_path}: CPU layout {layout} is not known here")
        return [Case(shape, tiles, bundle)]
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise click.ClickException(f"unknown shape {unknown[0]}; there are {', '.join(SHAPES)}")
    chosen = []
    for name in shapes:
        known = SHAPES[name]
        shape = LayerShape(
            name, known.hidden, known.intermediate, known.num_experts, known.top_k, layers or known.num_layers
        )
        chosen += [Case(shape, tiles) for tiles in (["q8", "i4"] if formats == "both" else [formats])]
    return chosen


def write_json(path: Path | None, benchmark: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the samples, with the CPU's name, if a path is given."""
    if path is None:
        return
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    path.write_text(json.dumps({"benchmark": benchmark, "cpu": cpu, "rows": rows}, indent=1) + "\n")
