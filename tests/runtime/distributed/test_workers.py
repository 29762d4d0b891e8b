"""Other ranks as child processes: those that nobody will need leave by themselves, and say nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest

from krasis.runtime.distributed.errors import RankError
from krasis.runtime.distributed.place import listen_locally, local_place
from krasis.runtime.distributed.workers import Workers
from krasis.runtime.settings import EngineSettings


def test_ranks_of_a_job_that_never_came_about_leave(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 found something in the way while it imported torch."""
    arguments = ["--bundle", "/nowhere", "--settings", json.dumps(asdict(EngineSettings(device="double")))]
    with listen_locally(2) as listener, caplog.at_level(logging.WARNING):
        workers = Workers(local_place(2, 0, listener), arguments)
        (process,) = workers._processes.values()
        workers.close()
        workers.close()
    assert process.returncode == RankError.exit_code
    assert not caplog.records
    assert capfd.readouterr().err == ""
