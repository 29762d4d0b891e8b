"""Converts a model of real layer shape and starts it: rates, peak memory, huge-page coverage, start-up times.

Makes the random-weight model if it is not there (4 layers of Qwen3-30B-A3B shape: about 6 GB of BF16 with its
embeddings), converts it in a process of its own while sampling that process's anonymous memory, then starts
``krasis-run`` on the warm bundle.

    python -m scripts.bench_convert --work models/bench
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

SAMPLE_PERIOD_S = 0.02


@dataclass(frozen=True, slots=True)
class Conversion:
    """One run of krasis-convert. Rates are bytes of BF16 input over the whole command's wall time."""

    input_bytes: int
    wall_s: float
    cpu_s: float
    peak_anonymous_bytes: int

    @property
    def input_gb_per_s(self) -> float:
        return self.input_bytes / self.wall_s / 1e9


@dataclass(frozen=True, slots=True)
class Start:
    """One warm start: the loading step, time to first token, and the whole command, in seconds."""

    load_s: float
    first_token_s: float
    command_s: float


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: its memory beyond the page cache. 0 once it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def tree_bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def command(name: str) -> str:
    """The console script beside this interpreter."""
    return str(Path(sys.executable).parent / name)


def children_cpu_s() -> float:
    """CPU seconds of all finished child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def convert(sources: list[Path], output: Path, extra: tuple[str, ...]) -> Conversion:
    input_bytes = sum(tree_bytes(path, "*.safetensors") for path in sources if path.is_dir())
    arguments = [command("krasis-convert"), *map(str, sources), "-o", str(output), "--force", *extra]
    cpu_before_s = children_cpu_s()
    begin = time.perf_counter()
    process = subprocess.Popen(arguments)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_PERIOD_S)
    wall_s = time.perf_counter() - begin
    if process.returncode != 0:
        raise click.ClickException(f"{' '.join(arguments)} returned {process.returncode}")
    return Conversion(input_bytes, wall_s, children_cpu_s() - cpu_before_s, peak_bytes)


def start(bundle: Path) -> Start:
    arguments = [
        command("krasis-run"),
        str(bundle),
        "--prompt",
        "def main():",
        "--raw",
        "--max-tokens",
        "1",
        "--json",
    ]
    begin = time.perf_counter()
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    command_s = time.perf_counter() - begin
    record = json.loads(result.stdout)
    return Start(record["load_s"], record["time_to_first_token_s"], command_s)


def huge_page_coverage(bundle: Path) -> tuple[int, int]:
    """(bytes in huge pages, bytes mapped) of the expert shards after reading their blobs once."""
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.host.huge_pages import huge_and_mapped_bytes
    from krasis.runtime.host.prefault import files_of_tiers

    tiers = ("cpu", "gpu")
    with Bundle.open(bundle) as opened:
        for tier in tiers:
            opened.prefault(tier, 1)
        return huge_and_mapped_bytes([opened.mapping_of(file) for file in files_of_tiers(opened, tiers)])


def make_model(work: Path, shape: str, layers: int, with_gguf: bool) -> list[Path]:
    model = work / f"{shape}-{layers}l"
    gguf = work / f"{shape}-{layers}l-q8_0.gguf"
    if not (model / "config.json").exists() or (with_gguf and not gguf.exists()):
        arguments = [
            sys.executable,
            "-m",
            "scripts.models.make_random_model",
            "--shape",
            shape,
            "--layers",
            str(layers),
        ]
        arguments += ["--out", str(model)] + (["--gguf", str(gguf)] if with_gguf else [])
        subprocess.run(arguments, check=True)
    return [model, gguf] if with_gguf else [model]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("models/bench"), show_default=True)
@click.option("--shape", default="qwen3-30b-a3b", show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--gguf/--no-gguf", "with_gguf", default=True, help="Give the converter a Q8_0 GGUF too.")
@click.option("--starts", default=5, show_default=True, help="Warm starts to time.")
@click.option(
    "--convert-option", multiple=True, help="Passed to krasis-convert, e.g. --convert-option=--threads=1."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures there too.")
@click.option("--clean", is_flag=True, help="Remove the work folder afterwards.")
def main(
    work: Path,
    shape: str,
    layers: int,
    with_gguf: bool,
    starts: int,
    convert_option: tuple[str, ...],
    json_path: Path | None,
    clean: bool,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    sources = make_model(work, shape, layers, with_gguf)
    bundle = work / f"{shape}-{layers}l.krasis"
    conversion = convert(sources, bundle, convert_option)
    click.echo(
        f"convert: {conversion.input_bytes / 1e9:.2f} GB of BF16 in {conversion.wall_s:.1f} s = "
        f"{conversion.input_gb_per_s:.3f} GB/s ({conversion.cpu_s:.1f} s of CPU), "
        f"peak anonymous memory {conversion.peak_anonymous_bytes / 1e9:.2f} GB"
    )
    runs = [start(bundle) for _ in range(starts + 1)][1:]
    for name in ("load_s", "first_token_s", "command_s"):
        values = [getattr(run, name) for run in runs]
        click.echo(
            f"warm start {name}: median {statistics.median(values):.3f} "
            f"({min(values):.3f} to {max(values):.3f})"
        )
    bundle_bytes = tree_bytes(bundle, "*.safetensors")
    pmd_bytes, mapped_bytes = huge_page_coverage(bundle)
    click.echo(
        f"bundle {bundle_bytes / 1e9:.2f} GB; expert shards mapped {mapped_bytes / 1e9:.2f} GB, "
        f"by huge pages {pmd_bytes / 1e9:.2f} GB"
    )
    if json_path:
        record = {
            "conversion": asdict(conversion),
            "starts": [asdict(run) for run in runs],
            "bundle_bytes": bundle_bytes,
            "file_pmd_mapped_bytes": pmd_bytes,
            "expert_mapped_bytes": mapped_bytes,
        }
        json_path.write_text(json.dumps(record, indent=1) + "\n")
    if clean:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
