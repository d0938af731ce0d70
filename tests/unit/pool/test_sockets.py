"""The sockets of children: what they do not take at once, and what wakes the pool."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tests.pool_harness import Child, Harness

StartPool = Callable[..., Harness]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def read_all(harness: Harness, child: Child) -> list[str]:
    """The ids of the inputs that a child reads in 40 turns, a part of its socket in each."""
    for _ in range(40):
        if len(child.runs) < 40:
            harness.poll()  # fails where the pool turns without anything to do
    return child.runs


def test_a_child_that_reads_slowly_gets_all_of_it_in_order(start_pool: StartPool) -> None:
    harness = start_pool({"work": 40})
    given = [harness.submit(headers={"large": "x" * 100_000}) for _ in range(40)]
    child = harness.child(0)
    assert 0 < len(child.runs) < 40, "the socket is full"
    assert read_all(harness, child) == [request.id for request in given]
    for request in given:
        child.done(request)


def test_a_child_that_dies_with_orders_unread_leaves_nothing_behind(start_pool: StartPool) -> None:
    harness = start_pool({"work": 40})
    given = [harness.submit(headers={"large": "x" * 100_000}) for _ in range(40)]
    harness.child(0).die()
    harness.advance(2.0)
    child = harness.child(0)
    child.ready()
    assert sorted(read_all(harness, child)) == sorted(request.id for request in given)
    for request in given:
        child.done(request)


def test_many_wake_ups_are_one_and_none_of_them_blocks(harness: Harness) -> None:
    for _ in range(50_000):
        harness.pool.wake()
    harness.poll()  # fails where they are not all read
    thread = threading.Thread(target=harness.pool.wake)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    harness.poll()


def test_nothing_stays_open_and_a_wake_up_after_the_end_is_no_error() -> None:
    with Harness().running() as harness:
        harness.child(0).ready()
        before = descriptors()
        harness.pool.grow(6)
        harness.advance(1.0)
        for child in harness.children[1:]:
            child.ready()
        harness.stop()
        harness.pool.wake()
        assert len(descriptors()) < len(before)
