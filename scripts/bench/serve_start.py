"""How long krasis-serve takes from its start to the first 200 of /health.

    python -m scripts.bench.serve_start tiny.krasis --rounds 10

The processor's time is that of the server, its engine and their helpers: on a machine that does other things
too it says more than the clock.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import click

from scripts.bench.serve_load import COMMAND

LIMIT_S = 600.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_well(port: int) -> bool:
    """Whether /health says 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def family(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text("ascii").split():
            found += family(int(child))
    return found


def processor_s(pid: int) -> float:
    """What a process has computed so far, in its own time and the system's; 0 if it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(bundle: Path, options: tuple[str, ...]) -> tuple[float, float]:
    """(seconds till it is well, seconds of processors by then)."""
    port = free_port()
    command = [sys.executable, "-c", COMMAND, str(bundle), "--port", str(port), "--quiet", *options]
    begin = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not is_well(port):
                if process.poll() is not None or time.perf_counter() - begin > LIMIT_S:
                    raise click.ClickException("the server did not begin")
                time.sleep(0.005)
            took_s = time.perf_counter() - begin
            return took_s, sum(processor_s(pid) for pid in family(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", type=int, default=10, show_default=True)
@click.option("--option", "options", multiple=True, help="Of krasis-serve; may be repeated.")
def main(bundle: Path, rounds: int, options: tuple[str, ...]) -> None:
    """Start a server of BUNDLE again and again."""
    start(bundle, options)  # files are in the page cache, modules are compiled
    found = [start(bundle, options) for _ in range(rounds)]
    took, computed = ([one[at] for one in found] for at in (0, 1))
    click.echo(
        f"{statistics.median(took):.2f} s from its start to the first 200 of /health ({min(took):.2f} to "
        f"{max(took):.2f}), {statistics.median(computed):.2f} s of processors (least {min(computed):.2f})"
    )


if __name__ == "__main__":
    main()
