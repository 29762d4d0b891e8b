"""What the record says beside the runs: machine, commands, where programs come from, what the models are."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from krasis.formats.checkpoints.gguf import GgufFile
from scripts.bench.machine import machine_facts
from scripts.bench.provision import Found, repository_state
from scripts.bench.record import Record
from scripts.bench.speed import Model

REPOSITORY = Path(__file__).resolve().parents[2]
RANDOM_PREFIX = "random-"  # of general.name, as make_random_model writes it


def note_facts(
    record: Record, stages: Sequence[str], models: Sequence[Model], sources: Mapping[str, Found]
) -> None:
    """Renews all of it."""
    note_machine(record, stages)
    note_programs(record, sources)
    record.set_facts("programs", {"krasis": repository_state(REPOSITORY)})
    record.set_facts("models", {model.name: model_text(model) for model in models})
    made = [model.name for model in models if general_name(model.gguf).startswith(RANDOM_PREFIX)]
    if made and len(made) == len(models):
        text = f"{', '.join(made)} have random weights of the released layer shapes and fewer layers"
        record.set_facts("gaps", {"Released models": text})


def note_machine(record: Record, stages: Sequence[str]) -> None:
    """The machine, and the command that is running."""
    record.set_facts("machine", machine_facts())
    command = shlex.join(["python", "-m", "scripts.bench.run", *sys.argv[1:]])
    record.set_facts("commands", dict.fromkeys(stages, command))


def note_programs(record: Record, sources: Mapping[str, Found]) -> None:
    """Where programs come from."""
    programs = {name: found.recipe or str(found.path or found.missing) for name, found in sources.items()}
    record.set_facts("programs", programs)


def general_name(gguf: Path) -> str:
    """What a GGUF calls its model."""
    return str(GgufFile.open(gguf).metadata.get("general.name", ""))


def model_text(model: Model) -> str:
    """Sizes of a model in a line."""
    config = json.loads((model.folder / "config.json").read_text("utf-8"))
    return (
        f"{general_name(model.gguf)}: {config['num_hidden_layers']} layers, hidden {config['hidden_size']}, "
        f"{config['num_experts']} experts of {config['moe_intermediate_size']} "
        f"(top {config['num_experts_per_tok']}), vocabulary {config['vocab_size']}; "
        f"GGUF of {model.gguf.stat().st_size / 1e9:.2f} GB"
    )
