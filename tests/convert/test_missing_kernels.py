"""A model that was understood but cannot run yet is refused in one sentence, before any work."""

import json
from pathlib import Path

import pytest

from krasis.convert.cli import main

CONFIGS = Path(__file__).parents[1] / "formats" / "models" / "configs"


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("deepseek-v3", "latent attention (MLA)"),  # quantised too, but that would be the smaller trouble
        ("gpt-oss-20b", "experts with biases"),
        ("llama-4-scout", "attention in chunks"),
        ("qwen3.5-35b-a3b", "linear attention (Gated DeltaNet)"),
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
