"""The lock of an engine: turns, refusals, cancelling, closing, and no interrupt that leaves it locked."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.exclusive import CallCancelledError, Cancellation, Claim, Exclusive
from tests.support.patience import PATIENCE_S


@contextmanager
def occupied(gate: Exclusive, cancellation: Cancellation | None = None) -> Iterator[threading.Event]:
    """Another thread is inside until the event is set, at the latest at the end."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        leave.wait(PATIENCE_S)

    thread = threading.Thread(target=gate.run, args=(cancellation, stay), daemon=True)
    thread.start()
    assert inside.wait(PATIENCE_S)
    try:
        yield leave
    finally:
        leave.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that has begun, and the list its result or error comes to."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001  the test looks at it
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_calls_come_in_one_by_one_in_the_order_they_came() -> None:
    gate, order = Exclusive(), []
    with occupied(gate) as leave:
        threads = []
        for number in range(4):
            threads.append(in_thread(lambda n=number: gate.run(None, order.append, n))[0])
            wait_for(lambda n=number: len(gate._line) == n + 1)
        assert order == []
        leave.set()
        # A caller that comes again and again, as the reader of an answer does, comes behind them.
        gate.run(None, order.append, "again")
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == [0, 1, 2, 3, "again"]


def test_never_two_at_once() -> None:
    gate, inside, most = Exclusive(), [], []

    def work() -> None:
        inside.append(1)
        time.sleep(0.0001)
        most.append(len(inside))
        inside.pop()

    threads = [in_thread(lambda: [gate.run(None, work) for _ in range(50)]) for _ in range(4)]
    for thread, _ in threads:
        thread.join(PATIENCE_S)
    assert most == [1] * 200


def test_a_call_within_a_call_is_refused_and_breaks_nothing() -> None:
    gate = Exclusive()
    for nested in (lambda: gate.run(None, print), lambda: gate.close(print)):
        with pytest.raises(UsageError, match="middle of a call of this very thread"):
            gate.run(None, nested)
    assert gate.run(None, lambda: 5) == 5


def test_a_waiting_call_can_be_cancelled() -> None:
    gate, mine = Exclusive(), Cancellation()
    with occupied(gate):
        thread, results = in_thread(lambda: gate.run(mine, print))
        wait_for(lambda: len(gate._line) == 1)
        mine.cancel()
        thread.join(PATIENCE_S)
        assert isinstance(results[0], CallCancelledError)
    assert gate.run(None, lambda: 5) == 5


def test_cancel_reaches_the_call_that_is_in_and_keeps_the_first_reason() -> None:
    gate, theirs = Exclusive(), Cancellation()
    gate.cancel()  # nothing is in: nothing happens
    with occupied(gate, theirs):
        gate.cancel()
        theirs.cancel("later")
        assert theirs.reason == "cancelled"
        with pytest.raises(CallCancelledError):
            theirs.check()


def test_closing_ends_who_is_in_waits_for_it_and_refuses_the_rest() -> None:
    gate, theirs, freed = Exclusive(), Cancellation(), []
    with occupied(gate, theirs) as leave:
        waiting, refused = in_thread(lambda: gate.run(None, print))
        wait_for(lambda: len(gate._line) == 1)
        closing, _ = in_thread(lambda: gate.close(lambda: freed.append(theirs.reason)))
        wait_for(lambda: theirs.reason == "closed")
        assert freed == []
        leave.set()
        closing.join(PATIENCE_S)
        waiting.join(PATIENCE_S)
    assert freed == ["closed"]
    assert isinstance(refused[0], UsageError)
    with pytest.raises(UsageError, match="closed"):
        gate.run(None, print)
    gate.close(lambda: freed.append("again"))


def test_a_failing_free_leaves_it_closed_and_unlocked() -> None:
    gate = Exclusive()

    def fail() -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011  the very one
        gate.close(fail)
    with pytest.raises(UsageError, match="closed"):
        gate.run(None, print)
    gate.close(lambda: None)


def test_a_claim_is_lost_by_a_change() -> None:
    gate = Exclusive()
    claim = Claim(gate)

    def change() -> int:
        gate.num_changes += 1
        return gate.num_changes

    assert claim.begin(change) == 1
    assert claim.go_on(change) == 2  # its own change
    gate.run(None, change)
    with pytest.raises(UsageError, match="another call has changed"):
        claim.go_on(change)


def test_a_child_of_fork_is_refused_even_if_somebody_is_inside() -> None:
    gate = Exclusive()
    with occupied(gate):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                gate.run(None, print)
            except UsageError as error:
                gate.close(lambda: os._exit(3))  # nothing there is the child's to free
                code = 0 if "child" in error.what else 2
            finally:
                os._exit(code)
        wait_for(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))


def test_an_interrupt_at_any_point_leaves_it_unlocked() -> None:
    """Python looks for signals where a function is entered and where a call has returned: a KeyboardInterrupt
    at every such point in turn, also while waiting."""
    for waits in (False, True):
        number, is_over = 0, False
        while not is_over:
            number += 1
            gate, seen = Exclusive(), 0

            def profile(frame: FrameType, event: str, arg: object, stop: int = number) -> None:
                nonlocal seen
                seen += event != "c_call"
                if seen == stop:
                    raise KeyboardInterrupt

            def call(gate: Exclusive = gate, profile: Any = profile) -> bool:
                sys.setprofile(profile)
                try:
                    gate.run(Cancellation(), len, "")
                except KeyboardInterrupt:
                    return False
                finally:
                    sys.setprofile(None)
                return True

            if waits:
                with occupied(gate) as leave:
                    timer = threading.Timer(0.002, leave.set)
                    timer.start()
                    is_over = call()
                    timer.join()
            else:
                is_over = call()
            thread, results = in_thread(lambda gate=gate: gate.run(None, lambda: 5))
            thread.join(PATIENCE_S)
            assert results == [5], f"interrupted at point {number}"
        assert number > 3
