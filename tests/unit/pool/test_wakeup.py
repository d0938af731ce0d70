from __future__ import annotations

import selectors
import threading
from collections.abc import Iterator

import pytest

from gw_celery.pool import wakeup


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


@pytest.fixture
def bell(selector: selectors.BaseSelector) -> Iterator[wakeup.Wakeup]:
    made = wakeup.Wakeup(selector)
    yield made
    made.close()


def test_nothing_is_there_before_somebody_wakes(
    selector: selectors.BaseSelector, bell: wakeup.Wakeup
) -> None:
    assert selector.select(0) == []
    bell.receive()


def test_a_wake_up_is_seen_until_it_is_taken(
    selector: selectors.BaseSelector, bell: wakeup.Wakeup
) -> None:
    bell.send()
    for _ in range(2):
        ((key, _),) = selector.select(0)
        assert key.data is None, "a child's socket has its child there"
    bell.receive()
    assert selector.select(0) == []


def test_many_wake_ups_are_one_and_none_of_them_blocks(
    selector: selectors.BaseSelector, bell: wakeup.Wakeup
) -> None:
    for _ in range(50_000):
        bell.send()
    assert len(selector.select(0)) == 1
    bell.receive()
    assert selector.select(0) == []
    bell.send()
    assert len(selector.select(0)) == 1


def test_another_thread_ends_a_wait(selector: selectors.BaseSelector, bell: wakeup.Wakeup) -> None:
    thread = threading.Thread(target=bell.send)
    thread.start()
    assert len(selector.select(30)) == 1
    thread.join()


def test_a_wake_up_that_comes_after_the_end_is_no_error(
    selector: selectors.BaseSelector,
) -> None:
    made = wakeup.Wakeup(selector)
    selector.close()
    made.close()
    made.send()
    made.close()
    assert (made._sender.fileno(), made._receiver.fileno()) == (-1, -1)
