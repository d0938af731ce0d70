"""The thread that keeps the counts of deaths in Redis, in what goes wrong there."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gw_celery.pool import poison
from tests.processes import eventually


class Redis:
    """A client that gives what it was made with, once it is let."""

    def __init__(self, **stored: Any) -> None:
        self.stored = {"gw:deaths:" + name: value for name, value in stored.items()}
        self.is_let = threading.Event()
        self.is_let.set()
        self.deleted: list[str] = []

    def get(self, key: str) -> Any:
        assert self.is_let.wait(30)
        return self.stored.get(key)

    def delete(self, key: str) -> None:
        self.deleted.append(key)


@dataclasses.dataclass(frozen=True)
class Lost:
    task_id: str
    runs_alone: bool = True


class Asked:
    """Counts, and what they answered in the test's thread."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.woken = threading.Semaphore(0)
        self.shared = poison.PoisonCounter(3, self, connect)
        self.asked: list[str] = []
        self.answers: list[tuple[str, int | None]] = []

    def wake(self) -> None:
        self.woken.release()

    def ask(self, task_id: str) -> bool:
        self.asked.append(task_id)
        return self.shared.ask(len(self.asked) - 1, task_id)

    def settle(self) -> list[tuple[str, int | None]]:
        """Wait for one answer, and return all."""
        assert self.woken.acquire(timeout=10)
        for number in self.shared.answers():
            task_id = self.asked[number]
            is_known = self.shared.is_suspect(task_id)
            self.answers.append((task_id, self.shared.count(task_id) if is_known else None))
        return self.answers


@contextmanager
def asking(connect: Callable[[], Any]) -> Iterator[Asked]:
    asked = Asked(connect)
    try:
        yield asked
    finally:
        asked.shared.close()


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "gw-deaths"]


def test_a_worker_in_which_nothing_dies_has_no_thread_and_no_connection() -> None:
    with asking(lambda: pytest.fail("connected")) as asked:
        assert list(asked.shared.answers()) == []
        assert threads() == []
    assert threads() == []


def test_questions_are_answered_in_their_order_over_one_connection() -> None:
    connections = []
    redis = Redis(a=b"2", b=0)
    with asking(lambda: connections.append(redis) or redis) as asked:
        for one in "abc":
            assert asked.ask(one)
            asked.settle()
        assert asked.answers == [("a", 2), ("b", 0), ("c", None)]
    assert connections == [redis]


def test_the_thread_ends_with_the_pool_after_what_was_ordered() -> None:
    redis = Redis()
    with asking(lambda: redis) as asked:
        asked.shared.forget("a")
        asked.shared.forget("b")
    assert redis.deleted == ["gw:deaths:a", "gw:deaths:b"]
    assert threads() == []
    asked.shared.close()


def test_what_redis_has_under_the_name_but_no_count_is_unknown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with asking(lambda: Redis(a=b"no number", b=b"1")) as asked:
        asked.ask("a")
        assert asked.settle() == [("a", None)]
        asked.ask("b")
        assert asked.settle() == [("a", None), ("b", 1)]
    assert "the counts of deaths in Redis could not be used" in caplog.text


def test_a_connection_that_fails_is_tried_again_with_the_next_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis, failures = Redis(a=b"1"), [ConnectionError("away"), OSError("still away")]

    def connect() -> Redis:
        if failures:
            raise failures.pop()
        return redis

    with asking(connect) as asked:
        asked.shared.record([Lost("a")])
        asked.shared.forget("a")
        asked.ask("a")
        assert asked.settle() == [("a", 1)]
    assert redis.deleted == []
    assert caplog.text.count("could not be used") == 2


def test_a_question_is_answered_when_redis_cannot_be_connected_to() -> None:
    def connect() -> Any:
        raise ConnectionError("away")

    with asking(connect) as asked:
        assert asked.ask("a")
        assert asked.settle() == [("a", None)], "or the input waits for its two seconds"


def test_with_more_questions_than_may_wait_the_next_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(poison, "_LONGEST_QUEUE", 2)
    redis = Redis(a=b"1")
    redis.is_let.clear()
    with asking(lambda: redis) as asked:
        assert asked.ask("a")
        eventually(asked.shared._orders.empty)
        assert [asked.ask(one) for one in "bcd"] == [True, True, False]
        asked.shared.record([Lost("e")])
        asked.shared.forget("e")
        redis.is_let.set()
        for _ in "abc":
            asked.settle()
        assert asked.answers == [("a", 1), ("b", None), ("c", None)]
    assert redis.deleted == [], "what found no room is dropped"


def test_a_redis_that_hangs_holds_up_no_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "_LONGEST_QUEUE", 1)
    redis = Redis()
    redis.is_let.clear()
    with asking(lambda: redis) as asked:
        asked.ask("a")
        eventually(asked.shared._orders.empty)
        asked.ask("b")
    assert len(threads()) == 1, "left behind; it is a daemon"
    redis.is_let.set()
    eventually(asked.shared._orders.empty)
    asked.shared.close()
    eventually(lambda: threads() == [])
