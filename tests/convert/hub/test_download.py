"""Models named on the hub come into its cache: only what is needed, checked, and once."""

from __future__ import annotations

import json
import os
from io import StringIO

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from loopback_hub import Model

from krasis.convert.cli import main
from krasis.convert.hub import download as module
from krasis.convert.hub.inputs import local_inputs, parse_inputs
from krasis.convert.progress import Reporter
from krasis.convert.text_assets import HF_ASSETS
from krasis.formats.errors import ChecksumError, FormatError, ResourceError, UsageError
from krasis.formats.hub.name import HubName
from krasis.formats.hub.needed import TEXT_FILES

REPORTER = Reporter(0, StringIO())


def fetch(*texts):
    return local_inputs(parse_inputs(texts), REPORTER)


def test_the_same_bundle_as_of_local_files(run, bundle, hub, cache, tmp_path):
    paths = fetch("org/tiny", "org/tiny-GGUF:Q8_0")
    assert all(path.is_relative_to(cache) for path in paths)
    assert run(paths, tmp_path / "tiny.krasis").files() == bundle.files()
    asked = len(hub.requests)
    assert fetch("org/tiny", "org/tiny-GGUF:q8_0") == paths
    assert all("/api/" in path for _, path, _, _ in hub.requests[asked:])  # nothing twice


def test_only_what_is_needed(hub, cache, copied, tmp_path):
    folder = copied(hub.models["org/tiny"].folder)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(100_000))
    hub.models["org/more"] = Model(folder)
    (path,) = fetch("org/more")
    names = {one.name for one in path.iterdir()}
    assert "config.json" in names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "README.md", "original"}


@pytest.fixture
def copied(tmp_path):
    def copy(folder):
        target = tmp_path / "copy"
        target.mkdir()
        for path in folder.iterdir():
            os.link(path, target / path.name)
        return target

    return copy


def test_revisions(hub, cache, copied):
    folder = copied(hub.models["org/tiny"].folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    hub.models["org/tiny"].revisions["v2"] = folder
    (path,) = fetch("org/tiny@v2")
    assert (path / "generation_config.json").read_text() == '{"top_k": 7}'


def test_without_sizes_in_the_list(hub, cache):
    hub.with_sizes = False
    (path,) = fetch("org/tiny")
    assert (path / "config.json").is_file()


def test_offline_takes_the_cache(hub, cache, monkeypatch):
    paths = fetch("org/tiny", "org/tiny-GGUF:Q8_0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/tiny", "org/tiny-GGUF:Q8_0") == paths
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        fetch("org/other")


def test_the_hub_out_of_reach(hub, cache, monkeypatch):
    paths = fetch("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch("org/tiny") == paths
    with pytest.raises(ResourceError, match=r"the hub cannot be reached.*127\.0\.0\.1:9"):
        fetch("org/other")


def test_a_token_is_for_the_hub_alone(hub, cache, monkeypatch):
    hub.models["org/tiny"].gated = True
    with pytest.raises(ResourceError, match=r"people who agreed to its terms.*/org/tiny, then set HF_TOKEN"):
        fetch("org/tiny")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    fetch("org/tiny")
    sent = {(path.startswith("/cdn"), token) for _, path, _, token in hub.requests if "harness" not in path}
    assert (False, f"Bearer {hub.token}") in sent
    assert (True, f"Bearer {hub.token}") not in sent


@pytest.mark.parametrize(
    ("text", "error", "pattern"),
    [
        ("org/none", UsageError, "there is no such model on the hub.*HF_TOKEN"),
        ("org/tiny@none", UsageError, "the model has no such revision"),
        ("org/tiny-GGUF:Q5_K", UsageError, r"no such quantisation \(got Q5_K; limit Q4_K_M, Q8_0\).*:Q4_K_M"),
        ("org/tiny-GGUF", UsageError, r"several GGUF models \(limit Q4_K_M, Q8_0\)"),
        ("org/tiny:Q8_0", FormatError, "no GGUF file"),
        ("org/empty", FormatError, "no model of a form that can be read.*README.md"),
    ],
)  # fmt: skip
def test_one_sentence(hub, cache, tmp_path, text, error, pattern):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.models["org/empty"] = Model(tmp_path / "empty")
    with pytest.raises(error, match=pattern) as raised:
        fetch(text)
    assert "\n" not in str(raised.value)


def test_a_disk_too_small(hub, cache, monkeypatch):
    found = os.statvfs("/")
    full = os.statvfs_result((*found[:4], 1, *found[5:10]))
    monkeypatch.setattr(module.os, "statvfs", lambda _: full)
    with pytest.raises(ResourceError, match=r"not enough disk space for the download.*--drop-sources"):
        fetch("org/tiny")


def test_a_download_that_broke_off_goes_on(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.cut_every = 200_000
    total = sum(path.stat().st_size for path in hub.models["org/tiny"].folder.iterdir())
    fetch("org/tiny")
    assert hub.sent < 1.2 * total  # resumed, not begun again


def test_other_bytes_than_the_hub_says(hub, cache, monkeypatch):
    digest = hub.digest
    monkeypatch.setattr(hub, "digest", lambda path: digest(path)[::-1])
    with pytest.raises(ChecksumError, match=r"safetensors: a downloaded file is not what.*run the same"):
        fetch("org/tiny")


def test_hostile_names_in_a_list(hub, cache, monkeypatch):
    from krasis.formats.hub import repository

    class Evil:
        sha = "0" * 40

        def __init__(self, name):
            fields = {"rfilename": name, "size": 1, "lfs": None, "blob_id": "a" * 40}
            self.siblings = [type("S", (), fields)()]

    for name in ("../x", "/etc/passwd", "a/../../b", "", "a//b"):
        monkeypatch.setattr(repository.HfApi, "model_info", lambda *_, _name=name, **__: Evil(_name))
        with pytest.raises(FormatError, match="impossible file"):
            repository.Repository.open(HubName("org/evil"))


def test_text_files_alone(run, hf_dir, hub, cache, copied, tmp_path):
    """--refresh-text org/model: no weights are downloaded."""
    folder = copied(hub.models["org/tiny"].folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    hub.models["org/texts"] = Model(folder)
    out = tmp_path / "tiny.krasis"
    run([hf_dir], out)
    done = CliRunner().invoke(main, ["--refresh-text", "org/texts", str(out), "-q", "--json"])
    assert done.exit_code == 0, done.stderr
    assert "generation_config.json" in json.loads(done.stdout)["replaced"]
    assert not any(path.endswith(".safetensors") for _, path, _, _ in hub.requests)


def test_every_text_file_is_fetched():
    assert set(HF_ASSETS) <= set(TEXT_FILES)
