"""A model that was understood but cannot run yet is refused in one sentence, before any work."""

import dataclasses
import json
from pathlib import Path

import pytest

from krasis.convert import convertible
from krasis.convert.cli import main
from krasis.convert.convertible import check_convertible, kernels_note
from krasis.formats.checkpoints.hf_config import read_hf_config
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.registry import family_of

CONFIGS = Path(__file__).parents[1] / "formats" / "models" / "configs"


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("llama-4-scout", "attention in chunks"),
    ],
)
def test_the_sentence_comes_before_any_work(tmp_path, capsys, name, lacking):
    source, out = tmp_path / "source", tmp_path / "out.krasis"
    source.mkdir()
    (source / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    (source / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(SystemExit) as ended:
        main([str(source), "-o", str(out)])
    assert ended.value.code == 4
    error = capsys.readouterr().err
    assert f"config.json: no kernels yet for {lacking}. Hint: the " in error
    assert json.loads((CONFIGS / f"{name}.json").read_text())["model_type"] in error
    assert not out.exists()


def config_of(name, **changes):
    return json.loads((CONFIGS / f"{name}.json").read_text("utf-8")) | changes


def test_a_family_that_runs_but_whose_checkpoints_are_not_read(monkeypatch: pytest.MonkeyPatch):
    """None is left, so one is made."""
    spec = read_hf_config(config_of("dots.llm1"), "config.json")
    nameless = dataclasses.replace(family_of(spec), names={})
    monkeypatch.setattr("krasis.convert.convertible.family_of", lambda _: nameless)
    with pytest.raises(UnsupportedModelError, match=r"not read yet.*got dots1; limit .*mixtral") as caught:
        check_convertible(spec, "config.json")
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("olmoe-1b-7b", {"hidden_size": 2080, "head_dim": 128}, "hidden size.*got 2080"),
        ("olmoe-1b-7b", {"intermediate_size": 1056}, "expert size.*got 1056"),
        ("glm-4.5-air", {"intermediate_size": 10_000}, r"columns of mlp\.w2.*got 10000"),
        ("glm-4.5-air", {"num_attention_heads": 96, "head_dim": 40, "num_key_value_heads": 8}, ""),
        ("glm-4.5-air", {"first_k_dense_replace": 46}, "without experts"),
        ("qwen2-57b-a14b", {"shared_expert_intermediate_size": 100}, r"columns of shared\.w2.*got 100"),
    ],
)
def test_sizes_that_no_layout_holds(name, changes, words):
    spec = read_hf_config(config_of(name, **changes), "config.json")
    if not words:
        check_convertible(spec, "config.json")
        return
    with pytest.raises(UnsupportedModelError, match=words):
        check_convertible(spec, "config.json")


def test_a_note_says_where_the_model_runs(monkeypatch):
    spec = read_hf_config(config_of("olmoe-1b-7b"), "config.json")
    need = "norms over the whole q and k"
    monkeypatch.setattr(convertible, "CPU_RUNS", frozenset({need}))
    monkeypatch.setattr(convertible, "GPU_RUNS", frozenset())
    assert f"on the CPU only: the GPU has no kernels yet for {need}" in str(
        kernels_note(spec, ("gpu", "cpu"))
    )
    assert kernels_note(spec, ("cpu",)) is None
    monkeypatch.setattr(convertible, "CPU_RUNS", frozenset())
    assert f"not run it yet: there are no kernels for {need}" in str(kernels_note(spec, ("cpu",)))
    monkeypatch.setattr(convertible, "CPU_RUNS", frozenset({need}))
    monkeypatch.setattr(convertible, "GPU_RUNS", frozenset({need}))
    assert kernels_note(spec, ("gpu", "cpu")) is None
