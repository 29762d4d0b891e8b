"""A rank's place, from torchrun's variables and back."""

from __future__ import annotations

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.distributed.place import Place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_torchrun() -> None:
    place = Place.from_environment({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (place.rank, place.num_ranks, place.local_rank, place.num_local_ranks) == (3, 4, 1, 2)
    assert (place.address, place.port, place.hosts_store) == ("host", 29500, False)
    assert Place.from_environment(place.environment()) == place


def test_rank_0_hosts_the_store_unless_an_agent_does() -> None:
    assert Place.from_environment({**TORCHRUN, "RANK": "0"}).hosts_store
    agent = {**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert not Place.from_environment(agent).hosts_store


def test_a_restarted_job_has_keys_of_its_own() -> None:
    first, second = (
        Place.from_environment({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count}) for count in "01"
    )
    assert first.prefix != second.prefix


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, "RANK: this rank is not one of the job's"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: not a number"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: too small"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: no address"),
    ],
)
def test_impossible_places(changes, message: str) -> None:
    environment = {name: text for name, text in {**TORCHRUN, **changes}.items() if text is not None}
    with pytest.raises(UsageError, match=message):
        Place.from_environment(environment)


def test_workers_do_not_see_what_a_launcher_left() -> None:
    place = Place.from_environment(TORCHRUN)
    left = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert Place.from_environment({**left, **place.environment()}) == place
