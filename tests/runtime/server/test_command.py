"""krasis-serve's options: what cannot be served is told in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.runtime.server.command import main


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no.krasis"], 2, "there is no such bundle"),
        (["."], 3, ""),
        ([".", "--cache-ram", "much"], 2, "not a size"),
        ([".", "--port", "99999"], 2, "99999"),
        ([".", "--api-key", " "], 2, "printable"),
        ([".", "--api-key-file", "none.txt"], 2, "cannot be read"),
        ([".", "--chat-template-kwargs", "[]"], 3, "chat-template-kwargs"),
        ([".", "--ctx", "0"], 2, "context"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port = [] if "--port" in arguments else ["--port", "0"]
    found = CliRunner().invoke(main, [*arguments, *port], prog_name="krasis-serve")
    assert found.exit_code == code, found.output
    assert words in found.output
    assert "fault of Krasis" not in found.output


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    from krasis.runtime.server.api_keys import keys_of

    file = tmp_path / "keys"
    file.write_text("# of the editors\nfirst\n\n second \n")
    assert keys_of(file) == ["first", "second"]


def test_the_server_imports_nothing_of_the_engines() -> None:
    """A start takes the time of the slower of the two: torch alone would be seconds."""
    code = (
        "import sys, krasis.runtime.server.opening, krasis.runtime.server.running;"
        "print(*{one.partition('.')[0] for one in sys.modules})"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "uvicorn" in found
    assert not {"torch", "transformers", "llguidance", "gguf", "h5py", "tqdm", "huggingface_hub"} & set(found)
