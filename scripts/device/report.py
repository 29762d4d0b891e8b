"""All results as one page of Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scripts.bench.shown import without_places
from scripts.device.state import State

Record = dict[str, Any]


def to_markdown(state: State) -> str:
    """A heading and a table a stage that is known; stages that failed are named with their error."""
    lines = ["# device_check", "", *stage_table(state)]
    for name, section in SECTIONS.items():
        entry = state.entries.get(name)
        if entry is not None and entry.result:
            lines += ["", *section(entry.result)]
    return without_places("\n".join(lines) + "\n")


def stage_table(state: State) -> list[str]:
    """What came of each stage."""
    rows = [
        [entry.stage, entry.status, f"{entry.seconds:.0f}", entry.error.replace("|", "/")[:300]]
        for entry in state.entries.values()
    ]
    return table(["stage", "outcome", "s", "why"], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def rates_section(result: Record) -> list[str]:
    machine = result["machine"]
    gpus = ", ".join(f"{one['name']} ({one['memory_bytes'] / 1e9:.0f} GB)" for one in machine["gpus"])
    rows = [[name.rpartition("_")[0].replace("_", " "), number(value)] for name, value in rates_of(result)]
    facts = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 1e9:.0f} GB; "
    facts += f"{gpus or 'no GPU'}; torch {machine['torch']}, kernel {machine['kernel']}"
    return ["## What the machine does", "", facts, "", *table(["measured", "GB/s or TFLOP/s"], rows)]


def rates_of(result: Record) -> list[tuple[str, float]]:
    return [(name, value) for name, value in result.items() if name.endswith(("_gbps", "_tflops"))]


def prefill_section(title: str) -> Callable[[Record], list[str]]:
    """Of one stack."""

    def section(result: Record) -> list[str]:
        runs, rates = result["runs"], result["rates"]
        columns = [prefill_column(run) for run in runs.values()]
        rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
        note = (
            f"{result['num_tokens']} tokens through {layers_of(result)} layers. Measured: pinned copies "
            f"{number(rates['pinned_to_device_gbps'])} GB/s, matrix products "
            f"{number(rates['matmul_tflops'])} TFLOP/s."
        )
        lines = [f"## Prefill, {title}", "", note, "", *table(["VRAM", *runs], rows)]
        for name, run in runs.items():
            lines += ["", f"{name}: {run['engine']['description']}; experts {store_of(run['engine'])}"]
            kernels = [[f"`{one['name']}`", str(one["calls"]), f"{one['ms']:.2f}"] for one in run["kernels"]]
            lines += ["", *table(["kernel", "calls", "ms"], kernels)] if kernels else []
        return lines

    return section


def prefill_column(run: Record) -> dict[str, str]:
    """One size of VRAM."""
    work, last = run["work"], run["last_prefill"]
    return {
        "given": gb(run["vram_bytes"]),
        "median": ms(run["median_s"]),
        "best": ms(run["best_s"]),
        "tokens/s of these layers": number(run["tokens_per_s"]),
        "limit": ms(work["limit_s"]),
        "**time / limit** (goal 1.15)": f"**{run['ratio']:.3f}**",
        "copied": gb(work["streamed_bytes"]),
        "copies at the measured rate": ms(work["copy_s"]),
        "products at the measured rate": ms(sum(work[f"{part}_s"] for part in PARTS)),
        "of these experts": ms(work["expert_s"]),
        "of these dense": ms(work["dense_s"]),
        "of these attention": ms(work["attention_s"]),
        "path": str(last.get("path")),
        "passes, groups": f"{last.get('num_passes')}, {last.get('num_groups')}",
        "opening, first prompt": f"{run['open_s']:.2f} s, {run['first_s']:.2f} s",
    }


PARTS = ("expert", "dense", "attention")


def families_section(result: Record) -> list[str]:
    rates, rows = result["rates"], []
    for row in result["rows"]:
        work = row["work"]
        rows.append(
            [
                row["label"],
                layers_of(row),
                ms(row["median_s"]),
                ms(work["limit_s"]),
                f"**{row['ratio']:.3f}**",
                ms(work["copy_s"]),
                ms(sum(work[f"{part}_s"] for part in PARTS)),
                f"{row['delta_share']:.1%}",
            ]
        )
    note = (
        f"{result['num_tokens']} tokens, every expert copied from host memory. Measured: pinned copies "
        f"{number(rates['pinned_to_device_gbps'])} GB/s, matrix products "
        f"{number(rates['matmul_tflops'])} TFLOP/s."
    )
    head = ["shape", "layers", "median", "limit", "**time / limit** (goal 1.15)"]
    head += ["copies", "products", "delta rule's share (goal 15 %)"]
    lines = ["## Prefill, other families", "", note, "", *table(head, rows)]
    for row in result["rows"]:
        kernels = [[f"`{one['name']}`", str(one["calls"]), f"{one['ms']:.2f}"] for one in row["kernels"]]
        lines += ["", row["label"], "", *table(["kernel", "calls", "ms"], kernels)] if kernels else []
    return lines


def decode_section(title: str) -> Callable[[Record], list[str]]:
    """Of one stack."""

    def section(result: Record) -> list[str]:
        floor = result["cpu_bytes_per_token"] / max(result["host_read_gbps"], 1e-9) / 1e9
        rows = [
            [
                name,
                number(run["tokens_per_s"]),
                ms(run["median_s"]),
                ms(run["slowest_s"]),
                ", ".join(f"{part} {shown(part, value)}" for part, value in run["split"].items()) or "-",
            ]
            for name, run in result["runs"].items()
        ]
        note = (
            f"{layers_of(result)} layers; all experts in RAM: {gb(result['cpu_bytes_per_token'])} a token: "
            f"{ms(floor)} at the measured {number(result['host_read_gbps'])} GB/s."
        )
        engines = [f"- {name}: {run['engine']['description']}" for name, run in result["runs"].items()]
        head = ["run", "tok/s", "median", "slowest", "split (means)"]
        return [f"## Decode, {title}", "", note, "", *table(head, rows), "", *engines]

    return section


def shown(part: str, value: float) -> str:
    """A split's entry: seconds or a count."""
    return ms(value) if part.endswith("_s") else number(value)


def serving_section(result: Record) -> list[str]:
    shared, between, alone = result["shared"], result["between"], result["pass"]
    facts = [
        [
            f"{shared['num_prompts']} x {shared['num_tokens']} tokens in one pass, one after another",
            f"{ms(shared['together_s'])}, {ms(shared['alone_s'])}",
            f"{shared['ratio']:.2f} times as fast (goal {shared['goal']:g})",
        ],
        [
            "long prompt alone; told of its layers; with an answer beside it",
            ", ".join(ms(one) for one in (alone["quiet_s"], alone["told_s"], between["pass_s"])),
            f"{between['num_tokens']} tokens in between",
        ],
        [
            "longest pause of the answer",
            f"{ms(between['longest_gap_s'])} (the core's part {ms(between['pause_s'])})",
            f"all layers: {ms(between['whole_model_gap_s'])} (goal {ms(between['goal_s'])})",
        ],
    ]
    rows = [
        [
            str(row["rows"]), ms(row["median_s"]), ms(row["expected_s"]), f"{row['ratio']:.3f}",
            f"{row['distinct']:.1f}", ms(row["cpu_experts_s"]), ms(row["wait_gpu_s"]),
            number(row["tokens_per_s"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["answers", "step", "expected", "ratio", "experts a layer", "CPU experts", "wait for GPU", "tok/s"]
    note = f"{layers_of(result)} layers. {result['description']}"
    lines = ["## Serving, Qwen3-235B shape", "", note, "", *table(["", "measured", ""], facts)]
    return [*lines, "", *table(head, rows)]


WAYS = ("streamed", "routed")


def short_section(result: Record) -> list[str]:
    rows = [
        [
            row["kind"], str(row["num_tokens"]),
            *(f"{ms(row[way]['median_s'])}, {gb(row[way]['bytes_copied'])}" for way in WAYS),
            f"{row['routed']['median_s'] / row['streamed']['median_s']:.3f}",
            f"{row['routed']['num_ahead']}, {100 * row['routed']['ahead_used']:.0f} %",
            ", ".join(f"{way} {ms(seconds)}" for way, seconds in row["expected_s"].items()),
            row["chosen"],
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["prompt", "tokens", "all copied", "chosen copied", "ratio", "ahead, used", "expected", "taken"]
    note = f"{layers_of(result)} layers. {result['description']}"
    return ["## Short prompts, Qwen3-235B shape", "", note, "", *table(head, rows)]


def gemm_section(result: Record) -> list[str]:
    rows = [
        [
            row["shape"], str(row["rows"]), str(row["num_experts"]), number(row["grouped_tflops"]),
            number(row["dense_tflops"]), f"{100 * row['share']:.0f} %", number(row["weights_gbps"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["shape", "rows/expert", "experts", "grouped TFLOP/s", "dense bf16 TFLOP/s", "share", "INT4 GB/s"]
    return ["## Grouped product", "", *table(head, rows)]


def startup_section(result: Record) -> list[str]:
    rows = []
    for name, run in result["runs"].items():
        load = run["load"]
        rows.append([
            name, f"{run['open_s']:.2f}", f"{run['first_token_s']:.2f}", f"{run['loaded_s']:.2f}",
            number(load.get("gbps", 0.0)), store_of(run["engine"]),
        ])  # fmt: skip
    note = (
        f"{gb(result['bundle_bytes'])} on {result['filesystem']}; the disk gives "
        f"{number(result['disk_gbps'])} GB/s ({result['disk_read']}), "
        f"memory {number(result['host_read_gbps'])} GB/s."
    )
    head = ["start", "open s", "first token s", "all pinned s", "GB/s", "experts"]
    return ["## Start-up", "", note, "", *table(head, rows)]


def registration_section(result: Record) -> list[str]:
    names = ("method", "place", "read_only", "ok", "register_gbps", "copy_gbps", "reason")
    rows = [[cell(trial.get(name)) for name in names] for trial in result["trials"]]
    return ["## Pinning host memory", "", *table(names, rows)]


def ranks_section(result: Record) -> list[str]:
    rows = [
        ranks_row(result, memory, count, run)
        for memory, runs in (("all streamed", result["runs"]), ("of a small card", result["cards"]))
        for count, run in runs.items()
    ]
    note = f"{result['num_tokens']} tokens through {layers_of(result)} layers, then tokens one by one."
    head = ["GPUs", "VRAM of each", "median", "best", "tok/s of these layers", "speed-up"]
    head += ["decode tok/s", "decoded on", "logits against 1 GPU"]
    return ["## Several GPUs", "", note, "", *table(head, rows)]


def ranks_row(result: Record, memory: str, count: str, run: Record) -> list[str]:
    """One number of GPUs. Speed-up: over one GPU with the same memory."""
    alone = (result["runs"] if memory == "all streamed" else result["cards"])["1"]
    picked = "same token" if run["same_token"] else "another token"
    return [
        count,
        f"{memory}, {gb(run['vram_bytes'])}",
        ms(run["median_s"]),
        ms(run["best_s"]),
        number(result["num_tokens"] / run["median_s"]),
        f"{alone['median_s'] / run['median_s']:.2f}",
        number(run["decode_tokens_per_s"]),
        run["decoded_on"],
        "-" if count == "1" else f"{100 * run['relative_distance']:.2f} %, {picked}",
    ]


def correctness_section(result: Record) -> list[str]:
    rows = [
        [name, ", ".join(f"{key} {value}" for key, value in facts.items())]
        for name, facts in result["measured"].items()
    ]
    counts = ", ".join(f"{result[f'num_{name}']} {name}" for name in ("passed", "failed", "skipped"))
    failures = [f"- **failed** {name}: {why}" for name, why in result["failures"].items()]
    return ["## Correctness", "", counts, "", *table(["test", "measured"], rows), "", *failures]


def native_section(result: Record) -> list[str]:
    return [
        "## Native tests",
        "",
        result["tests"],
        "",
        f"`{result['bench'][0]}`; the rest is in results.json",
    ]


def layers_of(result: Record) -> str:
    return f"{result['num_layers']} of {result['model_layers']}"


def store_of(engine: Record) -> str:
    choice = engine.get("store")
    return f"{choice['method']}: {choice['reason']}".replace("|", "/") if choice else "-"


def cell(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return "-" if value is None else str(value).replace("|", "/").replace("\n", " ")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3f} s"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def kv_section(result: Record) -> list[str]:
    rows = [
        [
            row["kind"],
            ms(row["prefill_s"]),
            ms(row["token_s"]),
            f"{row['position_bytes']:,.0f} B",
            f"{row['card_tokens']:,}",
        ]
        for row in result["rows"]
    ]
    note = (
        f"{layers_of(result)} layers, a prompt of {result['num_tokens']:,} tokens, all experts in VRAM where "
        f"they fit; the logits behind it lie {result['apart']:.1e} of their norm apart, with all in RAM they "
        f"{'are the same' if result.get('same_in_ram', True) else 'DIFFER'}."
    )
    head = ["kind", "prompt", "token behind it", "a position", "default context of 16 GiB"]
    return ["## Keys and values, Qwen3-30B shape", "", note, "", *table(head, rows)]


SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "rates": rates_section,
    "correctness": correctness_section,
    "prefill-235b": prefill_section("Qwen3-235B shape"),
    "prefill-30b": prefill_section("Qwen3-30B shape"),
    "families": families_section,
    "gemm": gemm_section,
    "decode-235b": decode_section("Qwen3-235B shape"),
    "decode-30b": decode_section("Qwen3-30B shape"),
    "kv": kv_section,
    "serving": serving_section,
    "short": short_section,
    "startup": startup_section,
    "registration": registration_section,
    "ranks": ranks_section,
    "native": native_section,
}
