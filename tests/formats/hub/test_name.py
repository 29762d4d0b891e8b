"""What is a name on the hub and what a path."""

from __future__ import annotations

import subprocess
import sys

import pytest

from krasis.formats.errors import UsageError
from krasis.formats.hub.name import HubName, hub_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/model", HubName("org/model")),
        ("org/model@v2", HubName("org/model", "v2")),
        ("org/model@refs/pr/3", HubName("org/model", "refs/pr/3")),
        ("org/model-GGUF:Q8_0", HubName("org/model-GGUF", None, "Q8_0")),
        ("org/model@v2:Q8_0", HubName("org/model", "v2", "Q8_0")),
        ("org/model:Q8_0@v2", HubName("org/model", "v2", "Q8_0")),
        ("org/model:Q8_0/model-Q8_0.gguf", HubName("org/model", None, "Q8_0/model-Q8_0.gguf")),
        ("hf://org/model", HubName("org/model")),
        ("hf:/org/model", HubName("org/model")),
        ("https://huggingface.co/org/model", HubName("org/model")),
        ("https://huggingface.co/org/model/", HubName("org/model")),
        ("https://huggingface.co/org/model/tree/main", HubName("org/model", "main")),
        ("https://hf.co/org/m/blob/main/m-Q8_0.gguf", HubName("org/m", "main", "m-Q8_0.gguf")),
    ],
)
def test_names(text, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == name


@pytest.mark.parametrize(
    "text", ["/org/model", "model", "a/b/c", "../org/model", "./org", "a/b@", "a/b@c@d", "~/a", "a/b:"]
)
def test_paths(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) is None


def test_local_files_do_without_the_hubs_library():
    """It takes as long to import as everything else together."""
    code = (
        "import sys; from krasis.convert import cli; from krasis.convert.hub.inputs import parse_inputs;"
        "from krasis.runtime.cli import info_command, info_source; parse_inputs(['/tmp', 'org/model']);"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/model") is None
    assert hub_name("org/misspelt") is None  # the folder is there, so that this is a slip
    assert hub_name("./other/model") is None
    assert hub_name("hf://org/model") == HubName("org/model")


@pytest.mark.parametrize(
    "text", ["https://example.com/org/model", "s3://bucket/model", "hf://model", "https://huggingface.co/"]
)
def test_other_addresses(text):
    with pytest.raises(UsageError, match="org/model"):
        hub_name(text)
