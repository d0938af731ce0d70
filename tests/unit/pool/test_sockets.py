from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gw_celery.pool import sockets


class Child:
    """A child's end of a socket pair, and what it still has to write."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.wants_to_write = False
        self.flushed = 0

    def fileno(self) -> int:
        return self.ours.fileno()

    def flush(self) -> None:
        self.flushed += 1
        self.wants_to_write = False


@pytest.fixture
def made() -> Iterator[sockets.Sockets]:
    made = sockets.Sockets()
    yield made
    made.close()


@pytest.fixture
def child(made: sockets.Sockets) -> Iterator[Any]:
    child: Any = Child()
    made.add(child)
    with child.ours, child.theirs:
        yield child


def readable(made: sockets.Sockets) -> list[Any]:
    return list(made.follow(made.wait(0)))


def test_only_a_child_that_wrote_is_to_be_read(made: sockets.Sockets, child: Any) -> None:
    assert readable(made) == []
    child.theirs.send(b"report")
    assert readable(made) == [child]


def test_what_a_full_socket_left_over_is_written_when_it_takes_more(
    made: sockets.Sockets, child: Any
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


def test_a_wake_up_ends_a_wait_once(made: sockets.Sockets, child: Any) -> None:
    made.wake()
    events = made.wait(30)
    assert len(events) == 1
    assert list(made.follow(events)) == []
    assert made.wait(0) == []


def test_a_child_that_ended_meanwhile_is_watched_no_more(made: sockets.Sockets, child: Any) -> None:
    child.wants_to_write = True
    made.watch(child)
    events = made.wait(0)
    made.remove(child)
    child.ours.close()
    assert list(made.follow(events)) == []
    made.watch(child)
    assert made.wait(0) == []


def test_nothing_stays_open(made: sockets.Sockets) -> None:
    descriptor = made.fileno()
    os.fstat(descriptor)
    made.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
