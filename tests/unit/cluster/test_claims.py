from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import pytest

from gw_celery.cluster import claims

EMBED = "embed"


def alone(me: str = "me", chance: float = 0.5) -> claims.Claims:
    return claims.Claims(me, [EMBED], lambda: chance)


def said(one: claims.Claims, score: float | None, start: float, end: float) -> list[float]:
    """When, in seconds, a worker with this score says it, looking once a second."""
    times = [start + second for second in range(int(end - start) + 1)]
    return [at for at in times if one.due({EMBED: score}, at)]


def knowing(worker: str, score: float, at: float = 0.0) -> claims.Claims:
    one = alone()
    one.hear(worker, {EMBED: score}, at)
    return one


# -- claiming --


def test_who_knows_of_nobody_claims_after_a_while() -> None:
    one = alone(chance=0.5)
    assert said(one, 10.0, 0.0, 30.0) == [5.0]
    assert one.best(EMBED) == 10.0


def test_who_does_not_know_its_score_says_nothing() -> None:
    assert said(alone(), None, 0.0, 60.0) == []


def test_who_hears_of_as_much_before_it_speaks_says_nothing() -> None:
    one = alone()
    assert said(one, 10.0, 0.0, 4.0) == []
    one.hear("other", {EMBED: 9.5}, 4.5)
    assert said(one, 10.0, 5.0, 60.0) == []
    assert one.best(EMBED) == 9.5


def test_who_is_clearly_better_says_so() -> None:
    assert said(knowing("other", 10.0), 11.5, 0.0, 60.0) == [5.0]


def test_a_claim_is_not_said_that_is_no_news_any_more() -> None:
    one = knowing("other", 10.0)
    assert said(one, 20.0, 0.0, 4.0) == []
    assert said(one, 10.0, 5.0, 20.0) == []


@pytest.mark.parametrize("score", [0, -1.0, float("nan"), float("inf"), 10**400, True, "9", None])
def test_what_is_no_score_is_ignored(score: Any) -> None:
    one = knowing("other", score)
    assert one.best(EMBED) is None


def test_what_is_said_of_other_services_or_by_itself_is_not_kept() -> None:
    one = alone()
    one.hear("other", {"unknown": 5.0}, 0.0)
    one.hear("me", {EMBED: 5.0}, 0.0)
    assert one.best(EMBED) is None


# -- holding --


def test_the_holder_answers_a_lower_claim_soon_and_with_pauses() -> None:
    one = alone(chance=0.0)
    assert said(one, 10.0, 0.0, 0.0) == [0.0]
    for second in range(1, 20):
        one.hear(f"new{second}", {EMBED: 5.0}, float(second))
        assert bool(one.due({EMBED: 10.0}, float(second))) == (second % 5 == 0)


def test_the_holder_answers_no_claim_that_is_as_good() -> None:
    one = alone(chance=0.0)
    said(one, 10.0, 0.0, 0.0)
    one.hear("new", {EMBED: 9.5}, 20.0)
    assert said(one, 10.0, 20.0, 60.0) == []


def test_the_holder_repeats_its_score_now_and_then() -> None:
    one = alone(chance=0.0)
    assert said(one, 10.0, 0.0, 1900.0) == [0.0, 600.0, 1200.0, 1800.0]


def test_the_holder_says_when_its_score_has_changed_but_not_at_once() -> None:
    one = alone(chance=0.0)
    said(one, 10.0, 0.0, 0.0)
    assert said(one, 10.5, 1.0, 100.0) == []
    one = alone(chance=0.0)
    said(one, 10.0, 0.0, 0.0)
    assert said(one, 5.0, 1.0, 100.0) == [60.0]


def test_a_holder_that_became_slower_is_followed_and_may_lose_its_place() -> None:
    one = knowing("other", 100.0)
    assert said(one, 10.0, 0.0, 20.0) == []
    one.hear("other", {EMBED: 5.0}, 20.0)
    assert one.best(EMBED) == 5.0
    assert said(one, 10.0, 21.0, 60.0) == [26.0]


def test_of_two_holders_of_the_same_score_one_is_left() -> None:
    a, b = alone("a", 0.0), alone("b", 0.0)
    assert a.due({EMBED: 10.0}, 0.0) == b.due({EMBED: 10.0}, 0.0) == {EMBED: 10.0}
    a.hear("b", {EMBED: 10.0}, 0.1)
    b.hear("a", {EMBED: 10.0}, 0.1)
    assert said(a, 10.0, 1.0, 700.0) == []
    assert said(b, 10.0, 1.0, 700.0) == [600.0]


# -- who is gone --


def test_a_holder_that_does_not_answer_a_lower_claim_is_gone() -> None:
    one = knowing("gone", 100.0)
    one.hear("a", {EMBED: 5.0}, 10.0)
    one.hear("b", {EMBED: 7.0}, 20.0)
    assert said(one, 6.0, 20.0, 39.0) == []
    assert one.best(EMBED) == 100.0
    assert said(one, 6.0, 40.0, 60.0) == []
    assert one.best(EMBED) == 7.0


def test_a_holder_that_answers_is_not_gone() -> None:
    one = knowing("holder", 100.0)
    one.hear("a", {EMBED: 5.0}, 10.0)
    one.hear("holder", {EMBED: 100.0}, 15.0)
    assert said(one, 6.0, 15.0, 100.0) == []
    assert one.best(EMBED) == 100.0


def test_a_score_that_is_not_repeated_is_forgotten() -> None:
    one = knowing("other", 100.0)
    assert said(one, 10.0, 0.0, 1799.0) == []
    assert said(one, 10.0, 1800.0, 1900.0) == [1805.0]


# -- a thousand --


class Town:
    """Workers that hear each other after a delay, and look once a second, each at its moment."""

    def __init__(self, scores: list[float], start_over: float, delay: float, seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self._delay = delay
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.scores = scores
        self.workers: list[claims.Claims | None] = [None] * len(scores)
        self.now = 0.0
        #: When something was said.
        self.said: list[float] = []
        for number in range(len(scores)):
            self._at(self._chance.uniform(0, start_over), lambda n=number: self._start(n))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def bests(self) -> set[float | None]:
        return {one.best(EMBED) for one in self.workers if one is not None}

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(
            self._events, (when, len(self._events) + self._chance.getrandbits(40), event)
        )

    def _start(self, number: int) -> None:
        self.workers[number] = claims.Claims(f"w{number}", [EMBED], self._chance.random)
        self._look(number)

    def _look(self, number: int) -> None:
        worker = self.workers[number]
        assert worker is not None
        if news := worker.due({EMBED: self.scores[number]}, self.now):
            self.said.append(self.now)
            self._at(self.now + self._delay, lambda: self._hear(f"w{number}", news))
        self._at(self.now + 1.0, lambda: self._look(number))

    def _hear(self, name: str, news: dict[str, float]) -> None:
        for worker in self.workers:
            if worker is not None:
                worker.hear(name, news, self.now)


def alike(count: int, seed: int = 1) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(100.0, 2.0) for _ in range(count)]


def mixed(count: int, seed: int = 1) -> list[float]:
    chance = random.Random(seed)
    return [chance.choice([25.0, 60.0, 100.0]) * chance.gauss(1.0, 0.02) for _ in range(count)]


@pytest.mark.parametrize(
    "scores", [pytest.param(alike(1000), id="alike"), pytest.param(mixed(1000), id="mixed")]
)
def test_a_thousand_that_start_together_agree_and_say_little(scores: list[float]) -> None:
    town = Town(scores, start_over=0.5, delay=0.1)
    town.run(60.0)
    assert 1 <= len(town.said) <= 40
    assert all(best is not None and best > max(scores) / 1.11 for best in town.bests())


def test_what_has_been_agreed_is_repeated_by_one_of_them() -> None:
    town = Town(mixed(100), start_over=0.5, delay=0.1)
    town.run(60.0)
    before = len(town.said)
    town.run(1200.0)
    assert 1 <= len(town.said) - before <= 4


def test_a_thousand_that_start_one_after_the_other_say_less_than_one_thing_each() -> None:
    town = Town(mixed(1000), start_over=300.0, delay=0.1)
    town.run(330.0)
    assert len(town.said) <= 300
    assert all(best is not None and best > max(town.scores) / 1.11 for best in town.bests())
