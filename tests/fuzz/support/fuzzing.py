"""Damages inputs and watches a parser: only KrasisError may escape, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import format_builders
import mutations
import xxhash

from krasis.formats.architecture import from_gguf_metadata, from_hf_config
from krasis.formats.bundle.manifest import AssetRecord, Manifest
from krasis.formats.bundle.shard_plan import plan_shards
from krasis.formats.checkpoints.gguf import GgufFile
from krasis.formats.checkpoints.gguf_tokenizer import tokenizer_assets
from krasis.formats.checkpoints.safetensors import SafetensorsFile
from krasis.formats.errors import KrasisError
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.registry import all_families
from krasis.formats.strict_json import parse_json_object

all_families()  # modules that a parser loads at its first use are not what an input made it allocate

CORPUS = Path(__file__).parents[1] / "corpus"
MAX_SECONDS = 2.0
MAX_BYTES_PER_BYTE, FREE_BYTES = 40, 4 << 20
_TRACED_EVERY = 8
_VARIABLE = re.compile(r"'.*'|\d+|: .*")  # names and numbers do not make a new kind of sentence

Parser = Callable[[bytes], None]
Mutator = Callable[[bytes, list[bytes], random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A parser, what damages its inputs knowingly, and sound inputs to begin with."""

    name: str
    parse: Parser
    mutate: Mutator
    seeds: Callable[[], list[bytes]]


@dataclass
class Result:
    """What a run found. crashes: (input, complaint). fresh: inputs that gave a sentence not seen before."""

    num_inputs: int = 0
    num_accepted: int = 0
    sentences: set[str] = field(default_factory=set)
    fresh: list[bytes] = field(default_factory=list)
    crashes: list[tuple[bytes, str]] = field(default_factory=list)


def corpus_of(name: str) -> list[bytes]:
    """The kept inputs of a parser, in order of name."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]


def run(target: Target, *, seed: int, num_inputs: int | None = None, seconds: float | None = None) -> Result:
    """First every seed and corpus file as it is, then damaged ones until the count or the time is up."""
    rng = random.Random(seed)
    result = Result()
    pool = [*target.seeds(), *corpus_of(target.name)]
    end = time.monotonic() + (seconds if seconds is not None else 1e9)
    for data in pool.copy():
        _try(target, data, result, is_traced=True)
    while (num_inputs is None or result.num_inputs < num_inputs) and time.monotonic() < end:
        base = rng.choice(pool)
        data = (
            target.mutate(base, pool, rng) if rng.random() < 0.6 else mutations.mutate_bytes(base, pool, rng)
        )
        if _try(target, data, result, is_traced=result.num_inputs % _TRACED_EVERY == 0):
            pool.append(data)
            result.fresh.append(data)
    return result


def _try(target: Target, data: bytes, result: Result, *, is_traced: bool) -> bool:
    """Whether the input led to a sentence that was not seen before."""
    result.num_inputs += 1
    sentence = "accepted"
    start = time.process_time()
    if is_traced:
        tracemalloc.start()
    try:
        target.parse(data)
        result.num_accepted += 1
    except KrasisError as error:
        sentence = f"{type(error).__name__}: {_VARIABLE.sub('#', error.what)}"
        if not str(error).isprintable() or len(str(error)) > 4000:
            result.crashes.append((data, f"unprintable or endless sentence: {str(error)[:200]!r}"))
    except Exception as error:  # noqa: BLE001 -- finding those is the point
        result.crashes.append((data, f"{type(error).__name__}: {error}"))
    seconds = time.process_time() - start
    if is_traced:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > MAX_BYTES_PER_BYTE * len(data) + FREE_BYTES:
            result.crashes.append((data, f"{peak} bytes allocated for {len(data)}"))
    if seconds > MAX_SECONDS:
        result.crashes.append((data, f"took {seconds:.1f} s"))
    is_fresh = sentence not in result.sentences
    result.sentences.add(sentence)
    return is_fresh


# ---- manifest ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_file(data: bytes) -> Iterator[Path]:
    """A file that never meets a disk: a hundred times faster to make."""
    fd = os.memfd_create("input")
    try:
        os.pwrite(fd, data, 0)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _parse_manifest(data: bytes) -> None:
    manifest = Manifest.from_bytes(data)
    if Manifest.from_bytes(manifest.to_bytes()) != manifest:
        raise ValueError("an accepted manifest is not reproduced")


def _mutate_manifest(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    """Damage under a true checksum."""
    try:
        record = json.loads(data)
        record.pop("checksum", None)
        record = mutations.mutate_json(record, rng)
        text = json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"
        record["checksum"] = xxhash.xxh3_128_hexdigest(text)
        return json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return mutations.mutate_bytes(data, pool, rng)


def _manifest_seeds() -> list[bytes]:
    plan = plan_shards([format_builders.SPECS[0], format_builders.SPECS[3]])
    digest = "0123456789abcdef" * 2
    asset = AssetRecord("config.json", "config.json.zst", 100, 500, digest)
    digests = {blob.spec.name: digest for file in plan.files for blob in file.blobs}
    manifest = format_builders.manifest_of(plan, digests, [asset])
    layers = manifest.spec.layers
    mixed = replace(layers[0], mlp=GatedMlp(96))
    seeds = (
        manifest,
        replace(manifest, format_minor=0),
        replace(manifest, spec=replace(manifest.spec, layers=(mixed, *layers[1:]))),
    )
    return [seed.to_bytes() for seed in seeds]


# ---- safetensors -------------------------------------------------------------------------------------------


def _parse_safetensors(data: bytes) -> None:
    with memory_file(data) as path:
        file = SafetensorsFile.open(path)
    covered = sum(file.view(name).nbytes for name in file.tensors)
    if covered != len(data) - file.header_bytes:
        raise ValueError("accepted tensors do not cover the data exactly")


def _mutate_safetensors(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    """Damage to the JSON under a true length, or to the length alone."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice(mutations.BOUNDARIES)) + data[8:]
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return mutations.mutate_bytes(data, pool, rng)
    text = mutations.encode_json(mutations.mutate_json(header, rng), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _safetensors_seeds() -> list[bytes]:
    entry = format_builders.tensor_entry
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", [2, 3], 0, 12),
        "empty": entry("F32", [0, 4], 12, 12),
        "b": entry("U8", [4], 12, 16),
        "scalar": entry("F32", [], 16, 20),
    }
    return [format_builders.safetensors(header, bytes(20)), format_builders.safetensors({})]


# ---- GGUF --------------------------------------------------------------------------------------------------


def _parse_gguf(data: bytes) -> None:
    with memory_file(data) as path:
        file = GgufFile.open(path)
    for name in file.tensors:
        file.view(name)
    from_gguf_metadata(file.metadata, file.tensors, "input")
    tokenizer_assets(file.metadata, "input")


def _mutate_gguf(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    return mutations.mutate_gguf(data, rng)


def _gguf_seeds() -> list[bytes]:
    build = format_builders
    letters = [chr(code) for code in range(ord("a"), ord("a") + 20)]
    tokens = [*letters, "ab", "<|im_end|>"]
    pairs = [
        *build.qwen3moe_pairs(),
        build.gguf_pair("tokenizer.ggml.model", build.STRING, "gpt2"),
        build.gguf_pair("tokenizer.ggml.pre", build.STRING, "qwen2"),
        build.gguf_pair("tokenizer.ggml.tokens", build.ARRAY, (build.STRING, tokens)),
        build.gguf_pair("tokenizer.ggml.token_type", build.ARRAY, (build.I32, [1] * 21 + [3])),
        build.gguf_pair("tokenizer.ggml.merges", build.ARRAY, (build.STRING, ["a b"])),
        build.gguf_pair("tokenizer.ggml.eos_token_id", build.U32, 21),
        build.gguf_pair("nested", build.ARRAY, (build.ARRAY, [(build.U8, [1, 2]), (build.BOOL, [0, 1])])),
        build.gguf_pair("f", build.F64, 1.5),
    ]
    records = [build.gguf_record("token_embd.weight", [64, 2], 0, 0), build.gguf_record("q", [32, 2], 8, 512)]
    return [build.Gguf(pairs=pairs, records=records, data=bytes(580)).build(), build.Gguf().build()]


# ---- config.json -------------------------------------------------------------------------------------------


def _parse_config(data: bytes) -> None:
    from_hf_config(parse_json_object(data, "config.json", max_bytes=MAX_CONFIG_BYTES), "config.json")


def _mutate_config(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return mutations.mutate_bytes(data, pool, rng)
    return mutations.encode_json(mutations.mutate_json(value, rng), rng)


def _config_seeds() -> list[bytes]:
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    old = format_builders.hf_config(rope_scaling=yarn)
    new = format_builders.hf_config(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=...
    )
    return [json.dumps(old).encode(), json.dumps(new).encode()]


TARGETS = {
    target.name: target
    for target in (
        Target("manifest", _parse_manifest, _mutate_manifest, _manifest_seeds),
        Target("safetensors", _parse_safetensors, _mutate_safetensors, _safetensors_seeds),
        Target("gguf", _parse_gguf, _mutate_gguf, _gguf_seeds),
        Target("config", _parse_config, _mutate_config, _config_seeds),
    )
}
