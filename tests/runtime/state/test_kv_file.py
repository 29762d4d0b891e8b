"""Saved prefixes: what is written, read back, refused, and left behind by a failure or a kill."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import KrasisError, MismatchError, UsageError
from krasis.formats.files.file_ops import FileOps
from krasis.runtime.state.kv_file import PrefixFile, bundle_identity, looks_like_prefix, save_prefix

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
CALLS = [name for name in vars(FileOps) if not name.startswith("_")]


def restore(path: Path, bundle: Any, cache: Any) -> tuple[list[int], bytes]:
    with PrefixFile(path) as file:
        file.check(bundle, cache)
        file.verify()
        file.restore(cache)
        return file.tokens(bundle.architecture), file.conversation()


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32"])
def test_what_is_saved_comes_back(
    tmp_path: Path, small_bundle: Any, stub_cache: Callable[..., Any], kv_dtype: str
) -> None:
    cache, path = stub_cache(20, kv_dtype, seed=1), tmp_path / "a.kv"
    save_prefix(path, small_bundle, cache, TOKENS, conversation=b'{"messages": []}')
    other = stub_cache(13, kv_dtype)  # of another capacity
    assert restore(path, small_bundle, other) == (TOKENS, b'{"messages": []}')
    count = len(TOKENS)
    np.testing.assert_array_equal(other.keys[:, :, :count], cache.keys[:, :, :count])
    np.testing.assert_array_equal(other.values[:, :, :count], cache.values[:, :, :count])
    assert not other.keys[:, :, count:].any()
    assert [one.name for one in tmp_path.iterdir()] == ["a.kv"]
    # No second copy of the cache: never more than one layer at a time was asked for.
    arch = small_bundle.architecture
    assert cache.largest_bytes * arch.num_layers == 2 * other.keys[:, :, :count].nbytes


def test_the_reference_library_reads_it(
    tmp_path: Path, small_bundle: Any, stub_cache: Callable[..., Any]
) -> None:
    import torch
    from safetensors import safe_open

    cache, path = stub_cache(20, "bf16", seed=2), tmp_path / "a.kv"
    save_prefix(path, small_bundle, cache, TOKENS)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"keys", "values", "tokens"}
        assert file.get_tensor("tokens").tolist() == TOKENS
        keys = file.get_tensor("keys")
        assert keys.dtype == torch.bfloat16
        expected = cache.keys[:, :, : len(TOKENS)]
        np.testing.assert_array_equal(keys.view(torch.uint16).numpy(), expected)
        assert file.metadata()["bundle"] == bundle_identity(small_bundle)
        assert file.metadata()["computed_by"] == "a stub"


def test_only_an_older_prefix_is_replaced(
    tmp_path: Path, small_bundle: Any, stub_cache: Callable[..., Any]
) -> None:
    path = tmp_path / "a.kv"
    save_prefix(path, small_bundle, stub_cache(seed=1), TOKENS)
    save_prefix(path, small_bundle, stub_cache(seed=2), TOKENS[:4])
    fresh = stub_cache()
    assert restore(path, small_bundle, fresh)[0] == TOKENS[:4]
    np.testing.assert_array_equal(fresh.keys[:, :, :4], stub_cache(seed=2).keys[:, :, :4])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.kv").symlink_to(path)
    for name in ("notes.txt", "link.kv"):
        with pytest.raises(UsageError, match="no saved prefix"):
            save_prefix(tmp_path / name, small_bundle, stub_cache(), TOKENS)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="no such folder"):
        save_prefix(tmp_path / "no" / "a.kv", small_bundle, stub_cache(), TOKENS)
    with pytest.raises(UsageError, match="nothing to save"):
        save_prefix(tmp_path / "b.kv", small_bundle, stub_cache(), [])
    assert not (tmp_path / "b.kv").exists()


def test_a_cache_it_does_not_fit_is_refused(
    tmp_path: Path, small_bundle: Any, stub_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.kv"
    save_prefix(path, small_bundle, stub_cache(seed=1), TOKENS)
    with PrefixFile(path) as file:
        with pytest.raises(MismatchError, match=r"another precision.*got f16; limit bf16"):
            file.check(small_bundle, stub_cache(kv_dtype="bf16"))
        with pytest.raises(UsageError, match=r"longer than the context.*11 tokens.*10 tokens.*--ctx"):
            file.check(small_bundle, stub_cache(10))
        file.check(small_bundle, stub_cache(11))
        monkeypatch.setattr("krasis.runtime.state.kv_file.bundle_identity", lambda _: "0" * 32)
        with pytest.raises(MismatchError, match="another bundle"):
            file.check(small_bundle, stub_cache())


def test_text_is_not_taken_for_a_prefix(
    tmp_path: Path, small_bundle: Any, stub_cache: Callable[..., Any]
) -> None:
    path = tmp_path / "a.kv"
    save_prefix(path, small_bundle, stub_cache(), TOKENS)
    assert looks_like_prefix(path)
    for text in (b"", b"{", b'{"messages": []}', b"{" * 9, b"\0" * 8 + b"{"):
        (tmp_path / "text").write_bytes(text)
        assert looks_like_prefix(tmp_path / "text") == (text == b"\0" * 8 + b"{")
    assert not looks_like_prefix(tmp_path / "nothing")


class Killed(BaseException):
    """The process ends here: no handler may change the disk any more."""


class Failing(FileOps):
    """Fails at one call with an error code, or, without one, at it and every later one but close."""

    def __init__(self, fail_at: int, code: int | None, unnamed: bool) -> None:
        self.fail_at, self.code, self.unnamed = fail_at, code, unnamed
        self.count = 0


def _failing(name: str) -> Callable[..., Any]:
    original = getattr(FileOps, name)

    def call(self: Failing, *arguments: Any) -> Any:
        if name == "open_unnamed" and not self.unnamed:
            raise OSError(errno.EOPNOTSUPP, "as some file systems say")
        self.count += 1
        if self.code is None and self.count > self.fail_at and name != "close":
            raise Killed
        if self.code is not None and self.count == self.fail_at + 1:
            if name == "close":
                original(self, *arguments)
            raise OSError(self.code, "injected")
        return original(self, *arguments)

    return call


for _name in CALLS:
    setattr(Failing, _name, _failing(_name))


@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed", "partial"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, None], ids=["ENOSPC", "EIO", "kill"])
@pytest.mark.parametrize("is_old", [True, False], ids=["old", "none"])
def test_failure_at_every_call(
    tmp_path: Path,
    small_bundle: Any,
    stub_cache: Callable[..., Any],
    code: int | None,
    unnamed: bool,
    is_old: bool,
) -> None:
    outcomes = set()
    for fail_at in itertools.count():
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        path = folder / "a.kv"
        if is_old:
            save_prefix(path, small_bundle, stub_cache(seed=1), TOKENS[:4])
        io = Failing(fail_at, code, unnamed)
        with contextlib.suppress(KrasisError, Killed):
            save_prefix(path, small_bundle, stub_cache(seed=2), TOKENS, io=io)
        if path.exists():
            tokens, _ = restore(path, small_bundle, stub_cache())
            assert tokens in ([TOKENS, TOKENS[:4]] if is_old else [TOKENS])
            outcomes.add(len(tokens))
        else:
            assert not is_old
            outcomes.add(0)
        left = {one.name for one in folder.iterdir()} - {"a.kv"}
        # An error cleans up; a kill can leave the named partial file only.
        assert left <= ({"a.kv.partial"} if code is None else set())
        # Whatever was left does not stand in the way.
        save_prefix(path, small_bundle, stub_cache(seed=3), TOKENS[:5])
        assert restore(path, small_bundle, stub_cache())[0] == TOKENS[:5]
        if io.count <= fail_at:
            break  # it was over before
    assert fail_at > 8
    assert outcomes == ({4, 11} if is_old else {0, 11})


def test_killed_at_every_call(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_saves.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    report = json.loads(done.stdout)
    assert report["killed"] >= 20
    assert report["wrong"] == []
