"""Text files that are not what they should be: told before the work, told of finished bundles, and mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from krasis.convert.cli import main as convert_main
from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine, EngineSettings, Message
from krasis.runtime.cli.info_command import main as info_main
from krasis.runtime.cli.run import main as run_main

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe"
MENDED = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 11422654\n"
Edit = Callable[[Path], Any]


def convert(*arguments: Any) -> Result:
    return CliRunner().invoke(convert_main, [str(one) for one in arguments], prog_name="krasis-convert")


def info(*arguments: Any) -> Result:
    return CliRunner().invoke(info_main, [str(one) for one in arguments], prog_name="krasis-info")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the model's folder, its weights by link."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.suffix == ".json":
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def bundle(trained_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(trained_bundle, tmp_path / "m.krasis"))


def writes(name: str, data: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data)


def changes(name: str, **keys: Any) -> Edit:
    def edit(folder: Path) -> None:
        record = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(record | keys), "utf-8")

    return edit


def links(name: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return edit


def more_tokens(folder: Path) -> None:
    record = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    last = record["added_tokens"][-1]
    record["added_tokens"] += [{**last, "id": 4096 + at, "content": f"<extra_{at}>"} for at in range(5)]
    (folder / "tokenizer.json").write_text(json.dumps(record), "utf-8")


def cut(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def in_the_way(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return edit


BROKEN: dict[str, tuple[Edit, str, str]] = {
    "an error message": (writes("tokenizer.json", b"Entry not found"), "tokenizer.json", "error message"),
    "a page": (writes("tokenizer.json", HTML), "tokenizer.json", "a web page"),
    "a pointer": (writes("tokenizer.json", POINTER), "tokenizer.json", "git-lfs"),
    "empty": (writes("tokenizer.json", b""), "tokenizer.json", "the file is empty"),
    "zeros": (writes("tokenizer.json", bytes(5000)), "tokenizer.json", "zeros only"),
    "cut": (cut("tokenizer.json"), "tokenizer.json", "cannot be read"),
    "bytes": (writes("tokenizer.json", b"\xff" * 100), "tokenizer.json", "not UTF-8"),
    "other JSON": (writes("tokenizer.json", b"[]"), "tokenizer.json", "cannot be read"),
    "another object": (writes("tokenizer.json", b"{}"), "tokenizer.json", "cannot be read"),
    "too many tokens": (more_tokens, "tokenizer.json", "more tokens than the model"),
    "a link to nowhere": (links("tokenizer.json", "../gone"), "tokenizer.json", "not there"),
    "a folder": (in_the_way("tokenizer.json"), "tokenizer.json", "not a regular file"),
    "config is a page": (writes("tokenizer_config.json", HTML), "tokenizer_config.json", "a web page"),
    "config is a pointer": (writes("tokenizer_config.json", POINTER), "tokenizer_config.json", "git-lfs"),
    "config is cut": (cut("tokenizer_config.json"), "tokenizer_config.json", "incomplete"),
    "tokens are nonsense": (
        changes("tokenizer_config.json", added_tokens_decoder={"x": 1}),
        "tokenizer_config.json",
        "not the id of a token",
    ),
    "template does not parse": (
        changes("tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }"),
        "tokenizer_config.json",
        "does not parse",
    ),
    "template is a number": (
        changes("tokenizer_config.json", chat_template=7),
        "_config.json",
        "must be text",
    ),
    "template file": (writes("chat_template.jinja", b"{% for"), "chat_template.jinja", "does not parse"),
    "template file of bytes": (writes("chat_template.jinja", b"\xff\xfe{\0"), "chat_template", "UTF-16"),
    "template always refuses": (
        writes("chat_template.jinja", b"{{ raise_exception('never') }}"),
        "chat_template.jinja",
        "never",
    ),
    "template link": (links("chat_template.jinja", "gone"), "chat_template.jinja", "not there"),
    "defaults are bytes": (writes("generation_config.json", b"\xff{"), "generation_config.json", "UTF-8"),
    "defaults are a page": (writes("generation_config.json", HTML), "generation_config.json", "a web page"),
    "special tokens": (writes("special_tokens_map.json", b"{"), "special_tokens_map.json", "not valid JSON"),
    "added tokens": (writes("added_tokens.json", POINTER), "added_tokens.json", "git-lfs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_told_before_the_work(name: str, source: Path, tmp_path: Path) -> None:
    edit, file, what = BROKEN[name]
    edit(source)
    result = convert(source, "-o", tmp_path / "out.krasis", "--dry-run", "-q", "--tiers", "cpu")
    assert result.exit_code == 3, result.output
    assert result.stderr.count("\n") == 1
    for part in (file, what, "--force-text"):
        assert part in result.stderr
    forced = convert(
        source, "-o", tmp_path / "out.krasis", "--dry-run", "-q", "--tiers", "cpu", "--force-text"
    )
    assert forced.exit_code == 0, forced.output
    assert what in forced.stderr
    assert "left out" in forced.stderr


NOTED: dict[str, tuple[Edit, str]] = {
    "no system": (
        changes(
            "tokenizer_config.json",
            chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
            "{% endif %}" + MENDED,
        ),
        "does not take a system message (no system role)",
    ),
    "no tools": (
        changes(
            "tokenizer_config.json",
            chat_template="{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + MENDED,
        ),
        "does not take tools (no tools here)",
    ),
    "no question": (changes("tokenizer_config.json", chat_template="hello"), "leaves out what the user says"),
    "marks that are no tokens": (
        changes("tokenizer_config.json", chat_template="<|turn|>" + MENDED),
        "writes <|turn|>, which is no token",
    ),
    "no template": (changes("tokenizer_config.json", chat_template=None), "there is no chat template"),
    "a pad token beyond the rows": (
        changes("tokenizer_config.json", pad_token="[PAD]"),  # noqa: S106  no password
        "'[PAD]' is left out",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_may_be_meant_is_noted(name: str, source: Path, tmp_path: Path) -> None:
    edit, what = NOTED[name]
    edit(source)
    result = convert(source, "-o", tmp_path / "out.krasis", "--dry-run", "-q", "--tiers", "cpu")
    assert result.exit_code == 0, result.output
    assert what in result.stderr


def test_forced_text_is_left_out_and_put_in_later(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.krasis"
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    changes("tokenizer_config.json", chat_template="{% for")(source)
    writes("generation_config.json", HTML)(source)
    assert convert(source, "-o", out, "-q", "--tiers", "cpu", "--force-text").exit_code == 0
    assert info(out, "--verify").exit_code == 0
    with Engine.open(out, EngineSettings(context=64, threads=1)) as engine:
        assert engine.text.template is None
        assert engine.encode("hi<|im_end|>") == [71, 72, 4095]
    result = convert("--refresh-text", TINY, out, "-q")
    assert result.exit_code == 0, result.output
    with Engine.open(out, EngineSettings(context=64, threads=1)) as engine:
        assert engine.text.template is not None
        assert engine.text.template.source == template
        assert engine.text.sampling.temperature > 0


def manifest(path: Path) -> Any:
    with Bundle.open(path) as opened:
        return opened.manifest


def test_a_mended_template_replaces_the_old_one(bundle: Path, source: Path) -> None:
    before = manifest(bundle)
    (source / "chat_template.jinja").write_text(MENDED)
    result = convert("--refresh-text", source, bundle)
    assert result.exit_code == 0, result.output
    assert "replaced: chat_template.jinja" in result.stderr
    assert manifest(bundle).blobs == before.blobs
    assert manifest(bundle).files == before.files
    assert info(bundle, "--verify").exit_code == 0
    with Engine.open(bundle, EngineSettings(context=64, threads=1)) as engine:
        assert engine.encode([Message("user", "hi")]) == engine.encode("[hi]")
    again = convert("--refresh-text", source / "chat_template.jinja", bundle, "--json", "-q")
    assert json.loads(again.stdout)["replaced"] == []
    # A template in the new tokenizer_config.json is not hidden by the file of the old one.
    changes("tokenizer_config.json", chat_template="{% for m in messages %}({{ m.content }}){% endfor %}")(
        source
    )
    assert convert("--refresh-text", source / "tokenizer_config.json", bundle, "-q").exit_code == 0
    with Engine.open(bundle, EngineSettings(context=64, threads=1)) as engine:
        assert engine.encode([Message("user", "hi")]) == engine.encode("(hi)")


def test_one_file_at_a_time(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    (tmp_path / "mine.jinja").write_text(MENDED)
    planned = convert("--refresh-text", tmp_path / "mine.jinja", bundle, "--dry-run")
    assert "would be replaced: chat_template.jinja" in planned.stderr
    assert "chat_template.jinja" not in [asset.name for asset in manifest(bundle).assets]
    for name in ("generation_config.json", "mine.jinja"):
        assert convert("--refresh-text", tmp_path / name, bundle, "-q").exit_code == 0
    with Engine.open(bundle, EngineSettings(context=64, threads=1)) as engine:
        assert engine.text.sampling.temperature == 0.25
        assert engine.encode([Message("user", "hi")]) == engine.encode("[hi]")


@pytest.mark.parametrize(
    "name", ["a page", "too many tokens", "template file", "defaults are bytes", "template link"]
)
def test_unsound_text_does_not_replace_sound(name: str, bundle: Path, source: Path) -> None:
    before = manifest(bundle)
    edit, file, what = BROKEN[name]
    edit(source)
    result = convert("--refresh-text", source, bundle, "-q")
    assert result.exit_code == 3
    assert file in result.stderr
    assert what in result.stderr
    assert manifest(bundle) == before


def test_the_tokenizer_of_another_model_is_refused(bundle: Path, source: Path) -> None:
    record = json.loads((source / "tokenizer.json").read_text("utf-8"))
    vocabulary = record["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (source / "tokenizer.json").write_text(json.dumps(record), "utf-8")
    result = convert("--refresh-text", source, bundle, "-q")
    assert result.exit_code == 5
    assert "2 of 4096 tokens differ" in result.stderr
    assert convert("--refresh-text", source, bundle, "-q", "--force-text").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["{hf}"], 2, "changes one bundle in its place"),
        (["{hf}", "{bundle}", "{bundle}"], 2, "changes one bundle in its place"),
        (["{hf}", "{bundle}", "-o", "x"], 2, "changes one bundle in its place"),
        (["{empty}", "{bundle}"], 2, "no text file in the source"),
        (["/nowhere", "{bundle}"], 2, "no such file or folder"),
        (["{hf}/config.json", "{bundle}"], 2, "not a text file of a model"),
        (["{hf}", "{empty}"], 3, "not a bundle"),
    ],
)
def test_wrong_use(
    arguments: list[str], code: int, what: str, bundle: Path, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"hf": source, "bundle": bundle, "empty": tmp_path / "empty"}
    first, *rest = [argument.format(**places) for argument in arguments]
    result = convert(*rest, "--refresh-text", first)
    if len(arguments) == 1:
        result = convert("--refresh-text", first, "-o", "x", first)
    assert result.exit_code == code, result.output
    assert what in result.stderr


def test_an_output_is_needed(source: Path) -> None:
    result = convert(source)
    assert result.exit_code == 2
    assert "-o model.krasis" in result.stderr


def test_verify_tells_of_text_that_cannot_be_used(bundle: Path) -> None:
    from krasis.formats.bundle.refresh import replace_assets

    replace_assets(bundle, {"chat_template.jinja": b"{% for", "generation_config.json": HTML})
    result = info(bundle, "--verify")
    assert result.exit_code == 3
    for part in ("intact", "cannot be used", "does not parse", "a web page", "--refresh-text"):
        assert part in result.stdout
    record = json.loads(info(bundle, "--verify", "--json").stdout)["verify"]
    assert record["intact"] is True
    assert len(record["text_problems"]) == 2
    # Plain text still runs, and a template of the user's helps at once.
    (bundle.parent / "mine.jinja").write_text(MENDED)
    flags = ["--temperature", "0", "--max-tokens", "2", "--ctx", "64", "--threads", "1"]
    assert convert("--refresh-text", TINY / "generation_config.json", bundle, "-q").exit_code == 0
    given = ["--prompt", "hi", "--chat-template", str(bundle.parent / "mine.jinja")]
    assert CliRunner().invoke(run_main, [str(bundle), *given, *flags]).exit_code == 0
