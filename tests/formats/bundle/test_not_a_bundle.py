"""What is given for a bundle and is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_builders import small_gguf, write_bundle

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000000\n"


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        Bundle.open(path)
    return str(caught.value)


def test_models_that_were_not_converted(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(small_gguf().build())
    assert "this is a GGUF, not a bundle. Hint: convert it first: krasis-convert" in refusal(gguf)
    assert "this is a GGUF's folder, not a bundle" in refusal(tmp_path)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert f"a Hugging Face checkpoint, not a bundle. Hint: convert it first: krasis-convert {hf}" in refusal(
        hf
    )
    assert f"krasis-convert {hf} -o" in refusal(hf / "model.safetensors")


def test_files_of_a_bundle_and_folders_above_it(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "m.krasis")
    for name in ("manifest.json", "dense-000.safetensors"):
        assert f"a file of a bundle. Hint: give {bundle}" in refusal(bundle / name)
    assert f"no manifest. Hint: give {bundle}" in refusal(tmp_path)
    page = tmp_path / "page"
    page.write_text("<html>")
    assert "not a directory but an HTML page" in refusal(page)


@pytest.mark.parametrize("name", ["manifest.json", "dense-000.safetensors", "gpu-000.safetensors"])
def test_a_bundle_cloned_without_git_lfs(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "m.krasis")
    (bundle / name).write_bytes(LFS)
    assert f"{name}: " in refusal(bundle)
    assert "git-lfs pointer" in refusal(bundle)
    assert "5.00 GB" in refusal(bundle)


def test_a_text_file_that_is_a_pointer(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "m.krasis")
    (bundle / "tokenizer.json.zst").write_bytes(LFS)
    with (
        Bundle.open(bundle) as opened,
        pytest.raises(FormatError, match=r"tokenizer\.json\.zst: .*git-lfs pointer"),
    ):
        opened.asset("tokenizer.json")
