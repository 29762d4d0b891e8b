"""The scheduler by tables of events: what comes when, and what it wants done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import UsageError
from krasis.runtime.serving.ids import Ids
from krasis.runtime.serving.prefix_store import PrefixStore
from krasis.runtime.serving.scheduler import Scheduler
from krasis.runtime.serving.steps import Job, Keep, Limits, Place, Run, Sleep


class Machine:
    """Does what a scheduler says, in no time but what it is told, and writes it down."""

    def __init__(self, num_slots: int = 4, pass_s: float = 1.0, step_s: float = 0.1, **limits: Any) -> None:
        self.store = PrefixStore(10**6)
        self.scheduler = Scheduler(
            Limits(**{"pass_rows": 1000, "company_s": 0.05, **limits}), num_slots, self.store
        )
        self.now, self.pass_s, self.step_s = 100.0, pass_s, step_s
        self.log: list[tuple[Any, ...]] = []
        self.num_slots = 0

    def add(self, name: str, prompt: Sequence[int], **options: Any) -> Job:
        job = Job(name, Ids(prompt), self.now, **options)
        self.scheduler.add(job)
        return job

    def step(self) -> bool:
        """Does the next step; False for sleep, which takes the time it wants."""
        step = self.scheduler.next(self.now)
        if isinstance(step, Sleep):
            if step.until_s is None:
                return False
            self.log.append(("sleep", round(step.until_s - self.now, 6)))
            self.now = step.until_s
        elif isinstance(step, Place):
            if step.slot.number < 0:
                step.slot.number, self.num_slots = self.num_slots, self.num_slots + 1
            source = step.source
            kind = "none" if not source.length else "store" if source.key is not None else "own"
            kind = "slot" if source.slot is not None and source.slot is not step.slot else kind
            self.log.append(("place", step.job.id, step.slot.number, kind, source.length))
            self.scheduler.put(step.job, step.slot, source.length)
        elif isinstance(step, Keep):
            self.log.append(("keep", step.slot.number, step.slot.length))
            self.store.put(
                step.slot.held, [(np.zeros((1, step.slot.length, 1)), np.zeros((1, step.slot.length, 1)))]
            )
            self.scheduler.kept(step.slot)
        else:
            self.run(step)
        return True

    def run(self, step: Run) -> None:
        kind = "pass" if step.is_pass else "step"
        self.log.append((kind, *((part.job.id, part.rows) for part in step.parts)))
        begin = self.now
        self.scheduler.begin(step)
        self.now += self.pass_s if step.is_pass else self.step_s
        self.scheduler.ran(step, begin, self.now)
        for part in step.parts:
            if part.job.remaining == 0:
                part.job.ids.append(7)

    def until(self, num_steps: int) -> list[tuple[Any, ...]]:
        """What is done in so many steps."""
        before = len(self.log)
        for _ in range(num_steps):
            if not self.step():
                break
        return self.log[before:]


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 10_000, length).tolist()


def test_prompts_that_come_together_share_one_pass_after_waiting_for_company() -> None:
    machine = Machine()
    for name in "abcd":
        machine.add(name, prompt(ord(name), 200))
        machine.now += 0.01
    assert machine.until(4) == [("place", name, number, "none", 0) for number, name in enumerate("abcd")]
    # Four slots are taken: nobody else can come, so nobody is waited for.
    assert machine.until(1) == [("pass", ("a", 200), ("b", 200), ("c", 200), ("d", 200))]
    assert machine.until(1) == [("step", ("a", 1), ("b", 1), ("c", 1), ("d", 1))]


def test_an_idle_machine_waits_for_company_and_no_longer() -> None:
    machine = Machine()
    machine.add("a", prompt(1, 200))
    machine.now += 0.02
    assert machine.until(3) == [("place", "a", 0, "none", 0), ("sleep", 0.03), ("pass", ("a", 200))]


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([1000], [(1000,)]),  # fits: is not cut
        ([600, 600], [(600,), (600,)]),  # no prompt is cut to fill a pass
        ([600, 600, 400], [(600, 400), (600,)]),  # a smaller one fills the room
        ([2300], [(1000,), (1000,), (300,)]),  # longer than any pass
        ([2300, 500], [(1000,), (1000,), (300, 500)]),
    ],
)
def test_what_goes_into_a_pass(lengths: list[int], passes: list[tuple[int, ...]]) -> None:
    machine = Machine()
    for number, length in enumerate(lengths):
        machine.add(str(number), prompt(number, length))
    machine.until(40)
    found = [tuple(rows for _, rows in entry[1:]) for entry in machine.log if entry[0] == "pass"]
    assert found == passes


def test_a_short_suffix_waits_for_nobody() -> None:
    machine = Machine()
    machine.add("a", prompt(1, 32))
    assert machine.until(2) == [("place", "a", 0, "none", 0), ("pass", ("a", 32))]


def test_an_identical_prompt_waits_for_the_first_and_costs_one_row() -> None:
    machine = Machine()
    same = prompt(1, 300)
    machine.add("a", same)
    machine.add("b", same)
    steps = machine.until(5)
    assert steps == [
        ("place", "a", 0, "none", 0),
        ("sleep", 0.05),
        ("pass", ("a", 300)),
        ("place", "b", 1, "slot", 299),
        ("step", ("a", 1), ("b", 1)),
    ]
    assert machine.scheduler.num_joined == 1


def test_where_state_cannot_be_cut_passes_end_before_the_prompts_end_and_its_last_token() -> None:
    machine = Machine(company_s=0.0, pass_rows=200)
    machine.scheduler.cuts_tails = False
    machine.add("a", prompt(1, 301))
    assert machine.until(5) == [
        ("place", "a", 0, "none", 0),
        ("pass", ("a", 200)),
        ("pass", ("a", 85)),
        ("pass", ("a", 15)),
        ("step", ("a", 1)),
    ]


@pytest.mark.parametrize(
    ("shared", "rest", "joins"),
    [
        (300, 20, True),  # a short suffix of its own: worth waiting
        (300, 100, False),  # another pass costs more than the shared rows
        (4500, 100, True),  # many rows saved
        (20, 20, False),  # nothing to gain
    ],
)
def test_a_shared_prefix_is_waited_for_if_that_pays(shared: int, rest: int, joins: bool) -> None:
    machine = Machine(pass_rows=10_000)
    common = prompt(1, shared)
    machine.add("a", common + prompt(2, rest))
    machine.add("b", common + prompt(3, rest))
    machine.until(20)
    passes = [entry for entry in machine.log if entry[0] == "pass"]
    assert len(passes) == 1 + joins
    if joins:
        assert passes[1] == ("pass", ("b", rest))


def test_who_waits_for_a_cancelled_prompt_goes_on_without_it() -> None:
    machine = Machine()
    same = prompt(1, 300)
    first = machine.add("a", same)
    machine.add("b", same)
    machine.until(1)
    machine.scheduler.end(first, machine.now)
    assert ("pass", ("b", 300)) in machine.until(4)


def test_a_prompt_cancelled_between_its_passes_leaves_what_is_done() -> None:
    machine = Machine(company_s=0.0)
    long = prompt(1, 2300)
    first = machine.add("a", long)
    machine.until(2)
    machine.scheduler.end(first, machine.now)
    machine.add("again", long)
    assert machine.until(3) == [
        ("place", "again", 0, "own", 1000),
        ("pass", ("again", 1000)),
        ("pass", ("again", 300)),
    ]


def test_answers_get_their_share_between_passes() -> None:
    machine = Machine(pass_s=8.0, step_s=0.5, decode_share=0.2)
    machine.add("a", prompt(1, 500))
    machine.until(3)
    machine.add("b", prompt(2, 500))
    machine.until(12)
    kinds = [entry[0] for entry in machine.log]
    first = kinds.index("pass")
    second = kinds.index("pass", first + 1)
    # 20 % of the time: 2 s after a pass of 8 s.
    assert kinds[first + 1 : second].count("step") == 4
    assert machine.log[second] == ("pass", ("b", 500))


def test_steps_go_on_while_a_prompt_waits_for_company() -> None:
    machine = Machine(step_s=0.02, decode_share=0.0)
    machine.add("a", prompt(1, 500))
    machine.until(3)
    machine.add("b", prompt(2, 500))
    kinds = [entry[0] for entry in machine.until(5)]
    assert kinds == ["place", "step", "step", "step", "pass"]


def test_priority_goes_first_but_not_for_ever() -> None:
    machine = Machine(num_slots=1, company_s=0.0, patience_s=60)
    busy = machine.add("busy", prompt(0, 100))
    machine.until(2)
    machine.add("low", prompt(1, 100))
    machine.add("high", prompt(2, 100), priority=1)
    machine.scheduler.end(busy, machine.now)
    high = machine.until(3)
    assert [entry[1] for entry in high if entry[0] == "place"] == ["high"]
    machine.now += 61
    machine.add("higher", prompt(3, 100), priority=2)
    machine.scheduler.end(machine.scheduler.placed[0], machine.now)
    later = machine.until(3)
    assert [entry[1] for entry in later if entry[0] == "place"] == ["low"]


def test_a_next_turn_goes_on_in_its_slot() -> None:
    machine = Machine(company_s=0.0)
    first = machine.add("turn 1", prompt(1, 300))
    machine.until(12)
    machine.scheduler.end(first, machine.now)
    machine.add("turn 2", [*prompt(1, 300), 7, 7, 7, *prompt(2, 50)])
    assert machine.until(2) == [("place", "turn 2", 0, "own", 303), ("pass", ("turn 2", 50))]


def test_a_side_question_works_on_a_copy() -> None:
    machine = Machine(company_s=0.0)
    main = machine.add("main", prompt(1, 300))
    machine.until(8)
    machine.scheduler.end(main, machine.now)
    held = main.done
    side = machine.add("title", prompt(1, 300) + prompt(2, 40), is_side=True)
    assert machine.until(2) == [("place", "title", 1, "slot", 300), ("pass", ("title", 40))]
    machine.scheduler.end(side, machine.now)
    machine.add("main 2", main.ids.first(held).tolist() + prompt(3, 50))
    assert machine.until(1) == [("place", "main 2", 0, "own", held)]


def test_side_questions_take_each_others_slots_and_never_a_conversations() -> None:
    machine = Machine(num_slots=3, company_s=0.0)
    mains = [machine.add(f"main {number}", prompt(number, 300)) for number in range(2)]
    machine.until(6)
    for main in mains:
        machine.scheduler.end(main, machine.now)
    for number in range(5):
        side = machine.add(f"side {number}", prompt(100 + number, 90), is_side=True)
        placed, *_ = machine.until(2)
        assert placed == ("place", f"side {number}", 2, "none", 0)
        machine.scheduler.end(side, machine.now)
    assert len(machine.store) == 0


def test_what_must_make_room_is_kept_first_and_comes_back() -> None:
    machine = Machine(num_slots=1, company_s=0.0)
    for name in ("a", "b"):
        job = machine.add(name, prompt(ord(name), 300))
        machine.until(6)
        machine.scheduler.end(job, machine.now)
    assert ("keep", 0, 304) in machine.log
    machine.add("a again", prompt(ord("a"), 300) + prompt(5, 60))
    steps = machine.until(3)
    assert [entry[0] for entry in steps] == ["keep", "place", "pass"]
    assert steps[1:] == [("place", "a again", 0, "store", 300), ("pass", ("a again", 60))]


def test_a_branch_leaves_the_other_branch_alone() -> None:
    machine = Machine(company_s=0.0)
    system = prompt(1, 200)
    first = machine.add("a", system + prompt(2, 200))
    machine.until(5)
    machine.scheduler.end(first, machine.now)
    machine.add("b", system + prompt(3, 200))
    assert machine.until(1) == [("place", "b", 1, "slot", 200)]


@pytest.mark.parametrize(
    ("shared", "conversation", "place"),
    [
        (800, "c", (0, "own")),  # a turn that drops the thinking of turns before
        (800, "d", (1, "slot")),
        (800, "", (1, "slot")),
        (200, "c", (1, "slot")),  # another agent of the same session
    ],
)
def test_whose_end_may_be_overwritten(shared: int, conversation: str, place: tuple[int, str]) -> None:
    machine = Machine(company_s=0.0)
    held = prompt(1, 1000)
    first = machine.add("a", held, conversation="c")
    machine.until(5)
    machine.scheduler.end(first, machine.now)
    machine.add("b", held[:shared] + prompt(3, 200), conversation=conversation)
    assert machine.until(1) == [("place", "b", *place, shared)]


def test_who_wants_the_whole_prompt_scored_takes_nothing_over() -> None:
    machine = Machine(company_s=0.0)
    first = machine.add("a", prompt(1, 300))
    machine.until(3)
    machine.scheduler.end(first, machine.now)
    machine.add("b", prompt(1, 300), reads_cache=False, wants_all=True)
    assert machine.until(2)[0][3:] == ("none", 0)
    run = machine.log[-1]
    assert run == ("pass", ("b", 300))


def test_with_all_slots_busy_others_wait() -> None:
    machine = Machine(num_slots=2, company_s=0.0)
    jobs = [machine.add(str(number), prompt(number, 100)) for number in range(4)]
    machine.until(10)
    assert [job.id for job in machine.scheduler.placed] == ["0", "1"]
    machine.scheduler.end(jobs[0], machine.now)
    machine.until(3)
    assert [job.id for job in machine.scheduler.placed] == ["1", "2"]
    machine.scheduler.end(jobs[3], machine.now)
    assert machine.scheduler.waiting == ()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_comes_all_get_done_and_rules_hold(data: st.DataObject) -> None:
    machine = Machine(num_slots=data.draw(st.integers(1, 3)), pass_rows=100, company_s=0.05)
    open_jobs: list[Job] = []
    for number in range(data.draw(st.integers(1, 12))):
        base, length = prompt(data.draw(st.integers(0, 2)), 250), data.draw(st.integers(1, 250))
        side = data.draw(st.booleans())
        open_jobs.append(
            machine.add(str(number), base[:length], is_side=side, keeps=data.draw(st.booleans()))
        )
        machine.until(data.draw(st.integers(0, 6)))
        if data.draw(st.booleans()):
            machine.scheduler.end(open_jobs.pop(data.draw(st.integers(0, len(open_jobs) - 1))), machine.now)
    for _ in range(400):
        for job in [job for job in open_jobs if len(job.ids) >= job.num_prompt + 3]:
            machine.scheduler.end(job, machine.now)
            open_jobs.remove(job)
        if not machine.step():
            break
    assert not open_jobs
    assert all(slot.is_idle for slot in machine.scheduler.slots)
    for entry in machine.log:
        if entry[0] in ("pass", "step"):
            rows = [rows for _, rows in entry[1:]]
            assert sum(rows) <= 100
            assert entry[0] == "pass" or set(rows) == {1}
    assert not any(one.users for one in machine.store)


@pytest.mark.parametrize("limits", [{"pass_rows": 0}, {"pass_rows": 1, "decode_share": 1.0}])
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Limits(**limits)
