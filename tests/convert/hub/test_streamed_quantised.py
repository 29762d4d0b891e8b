"""Quantised checkpoints that are converted while they are downloaded: scales come with their codes."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from convert_runs import tree_digests
from loopback_hub import Model
from quantised_checkpoints import quantise
from twin_quantisers import SCHEMES

from krasis.convert.conversion import convert, prepare
from krasis.convert.hub import fetcher, opening, remote, streamed
from krasis.convert.hub.inputs import opened_inputs, parse_inputs
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings


@pytest.mark.parametrize("scheme", ["fp8", "gptq", "int4"])
def test_the_same_bytes_as_of_local_files(
    hub, cache, fast_dir, run, hf_dir, tmp_path, monkeypatch, scheme: str
) -> None:
    monkeypatch.setattr(fetcher, "PART_BYTES", 256 << 10)
    monkeypatch.setattr(streamed, "_SLACK_BYTES", 0)
    monkeypatch.setattr(opening, "_FIRST_BYTES", 1 << 14)
    monkeypatch.setattr(remote.RemoteFile.__init__, "__defaults__", (0.001,))
    quantised, _ = quantise(hf_dir, tmp_path, SCHEMES[scheme])
    hub.models["org/quantised"] = Model(quantised)
    expected = run([quantised], fast_dir / "local.krasis").files()
    out: Path = fast_dir / "x.krasis"
    reporter = Reporter(1, StringIO())
    named = parse_inputs(["org/quantised"])
    with opened_inputs(named, out, reporter, restart=False, plan_only=False, drop=True) as (paths, more):
        convert(prepare(paths, out, ConvertSettings(), reporter, more), reporter)
    assert tree_digests(out) == expected
