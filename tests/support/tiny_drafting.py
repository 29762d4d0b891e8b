"""Tiny checkpoints that have a layer for multi-token prediction, named as the hub has it; and one who guesses
what he was told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from krasis.convert.cli import main as convert
from tests.support.random_weights import State
from tests.support.tiny_checkpoints import FIELDS_ABOUT_0, tiny
from tests.support.tiny_ggufs import read_tensors


def tiny_drafting(family: str, folder: Path, **changes: Any) -> Path:
    """``tiny`` of a family with one layer that drafts, like its last one but of other weights."""
    from safetensors.numpy import save_file

    tiny(family, folder, dtype="float32", **changes)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = read_tensors(folder)
    tensors |= draft_tensors(tensors, family, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draft_tensors(tensors: State, family: str, config: dict[str, Any]) -> State:
    """Those of the drafting layer."""
    config = config | config.get("text_config", {})
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    random = np.random.default_rng(5)
    is_mtp, middle = family in FIELDS_ABOUT_0, f"layers.{count - 1}."
    root = "mtp.layers.0." if is_mtp else f"model.layers.{count}."
    found = {
        root + name.partition(middle)[2]: random.permutation(values.ravel()).reshape(values.shape)
        for name, values in tensors.items()
        if middle in name
    }
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "fc")
    if not is_mtp:
        names = ("enorm", "hnorm", "shared_head.norm", "eh_proj")
    head = "mtp." if is_mtp else root
    for name in names[:3]:
        mean = 0.0 if is_mtp else 1.0
        found[f"{head}{name}.weight"] = mean + 0.2 * random.standard_normal(hidden)
    found[f"{head}{names[3]}.weight"] = 0.1 * random.standard_normal((hidden, 2 * hidden))
    if not is_mtp:
        found[f"{root}embed_tokens.weight"] = next(v for n, v in tensors.items() if "embed_tokens" in n)
        found[f"{root}shared_head.head.weight"] = tensors["lm_head.weight"]
    return {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()}


def as_in_a_gguf(folder: Path, out: Path) -> Path:
    """The checkpoint with Qwen's drafting layer under the names that llama.cpp gives it before it writes a
    GGUF (``_QwenMtpMixin.filter_tensors``); of other families it has them already.
    """
    from safetensors.numpy import save_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    root = f"model.layers.{(config | config.get('text_config', {}))['num_hidden_layers']}."
    own = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    names = {f"mtp.{a}.weight": f"{root}{b}.weight" for a, b in (*own.items(), ("norm", "shared_head.norm"))}
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).symlink_to(path)
    tensors = {
        names.get(name, name.replace("mtp.layers.0.", root)): values
        for name, values in read_tensors(folder).items()
        if not name.endswith(("shared_head.head.weight", f"{root}embed_tokens.weight"))
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def made_sure(folder: Path) -> Path:
    """The same checkpoint, changed in place: no layer adds anything, the head finds the token after that of
    an embedding, and the drafting layer hands on embeddings, so that it guesses what the model will say.
    """
    from safetensors.numpy import save_file

    tensors = read_tensors(folder)
    ends = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    for name, values in tensors.items():
        if name.endswith(ends):
            values[...] = 0
        elif values.ndim == 1 and name.endswith("norm.weight"):
            values[...] = 0 if "mtp.fc.weight" in tensors else 1
        elif name.endswith(("mtp.fc.weight", "eh_proj.weight")):
            values[...] = np.eye(*values.shape)
    embedding = next(values for name, values in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = np.roll(embedding, 1, axis=0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def converted(checkpoint: Path) -> Path:
    """A checkpoint's bundle, with the layer that drafts."""
    out = checkpoint.parent / "b.krasis"
    arguments = [str(checkpoint), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text", "--mtp"]
    done = CliRunner().invoke(convert, [*arguments, "--force-weights"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


class Told:
    """Guesses from a text that is known; every wrong-th guess is another token."""

    def __init__(self, text: Sequence[int], count: int, wrong: int = 0) -> None:
        self.text, self.count, self.wrong, self.num = list(text), count, wrong, 0

    def propose(self, held: Sequence[int], token: int, count: int, slot: int = 0) -> list[int]:
        assert [*held, token] == self.text[: len(held) + 1]
        guesses = self.text[len(held) + 1 :][:count]
        for number in range(len(guesses)):
            self.num += 1
            if self.wrong and self.num % self.wrong == 0:
                guesses[number] = (guesses[number] + 1) % 256
        return guesses

    def follow(self, batch: object, hidden: object, *, computes: bool = True) -> None:
        pass

    def forget(self, slot: int = 0) -> None:
        pass
