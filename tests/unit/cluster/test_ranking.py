from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from gw_celery.cluster import claims, ranking
from gw_celery.pool import request
from tests.processes import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(request, "now", lambda: made.now)
    return made


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("ranked", broker="memory://ranked", set_as_current=False) as made:
        yield made


@pytest.fixture
def told(app: Celery) -> Iterator[Callable[[], list[Any]]]:
    """What any worker of the app's broker has been told, as Celery's mailbox reads it."""
    heard: list[Any] = []

    def gw_best_score(state: Any, **arguments: Any) -> None:
        heard.append(arguments)

    with app.connection_for_read() as connection:
        node = app.control.mailbox(connection).Node(
            "listener", state={}, handlers={"gw_best_score": gw_best_score}, channel=connection
        )
        consumer = node.listen()

        def read() -> list[Any]:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            return heard

        yield read
        consumer.cancel()


@pytest.fixture
def ranked(app: Celery, clock: Clock) -> Iterator[ranking.Ranking]:
    made = ranking.Ranking(app, "me@host", ["embed"])
    yield made
    made.close()


def test_a_worker_that_has_its_score_is_quick_and_tells_the_others(
    ranked: ranking.Ranking, clock: Clock, told: Callable[[], list[Any]]
) -> None:
    assert not ranked.tick({"embed": None})
    assert not ranked.tick({"embed": 40.0})
    assert (ranked.priority("embed"), ranked.bands()) == (0, {"embed": "middle"})
    clock.now += claims._HESITATION
    assert ranked.tick({"embed": 40.0})
    assert (ranked.priority("embed"), ranked.bands()) == (1, {"embed": "quick"})
    assert eventually(told) == [{"worker": "me@host", "scores": {"embed": 40.0}}]


def test_a_worker_that_hears_of_a_much_better_one_is_slow(
    ranked: ranking.Ranking, clock: Clock
) -> None:
    ranked.hear("other@host", {"embed": 100.0})
    assert ranked.tick({"embed": 25.0})
    assert ranked.priority("embed") == -1


def test_what_it_does_not_serve_has_no_priority_of_its_own(ranked: ranking.Ranking) -> None:
    assert ranked.priority("") == ranked.priority("classify") == 0


@pytest.mark.parametrize(
    ("broker", "is_ranked"),
    [("amqp://nowhere", True), ("redis://nowhere", False), ("memory://", False)],
)
def test_workers_are_ranked_where_the_broker_prefers_consumers(
    broker: str, is_ranked: bool
) -> None:
    with Celery("ranked", broker=broker, set_as_current=False) as app:
        assert (ranking.of(app, "me@host", ["embed"]) is not None) == is_ranked


def test_a_worker_without_remote_control_is_not_ranked() -> None:
    with Celery("ranked", broker="amqp://nowhere", set_as_current=False) as app:
        app.conf.worker_enable_remote_control = False
        assert ranking.of(app, "me@host", ["embed"]) is None


class Silent(ranking.Crier):
    """Cannot tell anything before it is freed, and then fails."""

    def __init__(self, app: Any) -> None:
        super().__init__(app, "me@host")
        self.tries = 0
        self.is_free = threading.Event()

    def _tell(self, scores: dict[str, float]) -> None:
        self.tries += 1
        assert self.is_free.wait(30)
        raise ConnectionError("away")


def test_a_broker_that_hangs_holds_nobody_up(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_FAREWELL", 0.05)
    crier = Silent(app)
    for number in range(100):
        crier.say({"embed": float(number)})
    crier.close()
    assert crier.tries <= 1
    crier.is_free.set()
    assert crier._thread is not None
    crier._thread.join(30)


def test_a_broker_that_cannot_be_reached_is_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Celery("ranked", broker="amqp://127.0.0.1:1//", set_as_current=False) as app:
        crier = ranking.Crier(app, "me@host")
        crier.say({"embed": 1.0})
        eventually(lambda: "ConnectionRefusedError" in caplog.text, 20)
        crier.close()
        assert crier._thread is not None
        assert not crier._thread.is_alive()


def test_a_broker_that_is_away_is_told_of_once(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    crier = Silent(app)
    crier.is_free.set()
    for _ in range(3):
        crier.say({"embed": 1.0})
    eventually(lambda: crier.tries == 3)
    crier.close()
    assert caplog.text.count("other workers are not told how quick this one is") == 1
