from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gw_celery.pool import child_process


class Child:
    """A child's end of a socket pair, and what it still has to write."""

    def __init__(self, sockets: Any) -> None:
        self.sockets = sockets
        self.ours, self.theirs = socket.socketpair()
        self.wants_to_write = False
        self.flushed = 0

    def fileno(self) -> int:
        return self.ours.fileno()

    def flush(self) -> None:
        self.flushed += 1
        self.wants_to_write = False
        self.sockets.watch(self)


@pytest.fixture
def made() -> Iterator[child_process.Sockets]:
    made = child_process.Sockets()
    yield made
    made.close()


@pytest.fixture
def child(made: child_process.Sockets) -> Iterator[Any]:
    child: Any = Child(made)
    made.add(child)
    with child.ours, child.theirs:
        yield child


def readable(made: child_process.Sockets) -> list[Any]:
    return list(made.follow(made.wait(0)))


def test_only_a_child_that_wrote_is_to_be_read(made: child_process.Sockets, child: Any) -> None:
    assert readable(made) == []
    child.theirs.send(b"report")
    assert readable(made) == [child]


def test_what_a_full_socket_left_over_is_written_when_it_takes_more(
    made: child_process.Sockets, child: Any
) -> None:
    made.watch(child)
    assert readable(made) == []
    assert child.flushed == 0

    child.wants_to_write = True
    made.watch(child)
    assert readable(made) == []
    assert child.flushed == 1

    readable(made)
    assert child.flushed == 1, "it is not asked for when nothing is left"


def test_a_wake_up_ends_a_wait_once(made: child_process.Sockets, child: Any) -> None:
    made.wake()
    events = made.wait(30)
    assert len(events) == 1
    assert list(made.follow(events)) == []
    assert made.wait(0) == []


def test_a_child_that_ended_meanwhile_is_watched_no_more(
    made: child_process.Sockets, child: Any
) -> None:
    child.wants_to_write = True
    made.watch(child)
    events = made.wait(0)
    made.remove(child)
    child.ours.close()
    assert list(made.follow(events)) == []
    made.watch(child)
    assert made.wait(0) == []


def test_nothing_stays_open(made: child_process.Sockets) -> None:
    descriptor = made.fileno()
    os.fstat(descriptor)
    made.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_many_wake_ups_are_one_and_none_of_them_blocks(made: child_process.Sockets) -> None:
    for _ in range(50_000):
        made.wake()
    events = made.wait(0)
    assert len(events) == 1
    assert list(made.follow(events)) == []
    assert made.wait(0) == []
    made.wake()
    assert len(made.wait(0)) == 1


def test_another_thread_ends_a_wait(made: child_process.Sockets) -> None:
    thread = threading.Thread(target=made.wake)
    thread.start()
    assert len(made.wait(30)) == 1
    thread.join()


def test_a_wake_up_that_comes_after_the_end_is_no_error(made: child_process.Sockets) -> None:
    made.close()
    made.wake()
