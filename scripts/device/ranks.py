"""The same prompt on one, two, ... GPUs of this machine, by krasis-run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from device import places
from device.context import Context
from device.runner import SkippedError

RUN = "from krasis.runtime.cli import main; main(prog_name='krasis-run')"
LABELS = ("30b", "235b")


def run(context: Context) -> dict[str, Any]:
    """prefill seconds by number of GPUs. Raises SkippedError with one GPU."""
    counts = gpu_counts(context)
    if len(counts) < 2:
        raise SkippedError("this machine has one GPU")
    label = LABELS[0] if context.size == "tiny" else LABELS[1]
    bundle, made = places.bundle_in_ram(context, label)
    return {**made, "runs": {str(count): run_once(context, bundle, count) for count in counts}}


def gpu_counts(context: Context) -> list[int]:
    """1, 2, 3 and all."""
    if not context.is_cuda:
        return [1, 2]
    import torch

    most = torch.cuda.device_count()
    return sorted({count for count in (1, 2, 3, 4, most) if count <= most})


def run_once(context: Context, bundle: Any, count: int) -> dict[str, Any]:
    """One prompt; its text has about as many tokens as the sizes say."""
    words = context.sizes.prompt_tokens
    command = [sys.executable, "-c", RUN, str(bundle), "--raw", "--json", "--file", "-", "--max-tokens", "4"]
    command += [
        "--device",
        context.device,
        "--gpus",
        str(count),
        "--temperature",
        "0",
        "--ctx",
        str(words + 200),
    ]
    # One word is one token of the bundle's tokenizer; a little less, so that it fits.
    text = " the" * words
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    print(done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"{count} GPUs: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    report = json.loads(done.stdout)
    names = ("num_prompt_tokens", "prefill_s", "prefill_tokens_per_s", "load_s", "prefilled_on", "tokens")
    return {name: report[name] for name in names}
