"""Workers of one project over a real Redis, on a clock that a test moves.

What a worker tells the others, and learns of them, is driven here as its pool drives it, without
the pool: ``Project.add`` makes a worker, ``after`` lets seconds pass in all of them but those that
are frozen, or stuck in their loop. A test looks at what is in Redis (docs/cluster.md has the keys),
at what is logged, and at what a ``Member`` knows. ``Answerer`` does what is left to do for lost
workers, ``hold`` and ``leave_record`` write what one of them had taken from the broker and begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytest
import redis
from celery import Celery

# -- what is known of the inside: a new layout changes these lines and no others --
from gw_celery.cluster import (
    early_acks,
    held,
    liveness,
    lost_workers,
    membership,
    poison_counts,
    queue_lengths,
)
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import Size
from gw_celery.transport import find, holds


def _stop_clocks(patch: pytest.MonkeyPatch, now: Callable[[], float]) -> None:
    for module in (membership, queue_lengths):
        patch.setattr(module, "time", types.SimpleNamespace(monotonic=now))
    patch.setattr(holds, "now", now)
    beat = liveness.BEAT.replace("redis.call('TIME')", f"{{redis.call('GET', '{CLOCK}'), '0'}}")
    assert beat != liveness.BEAT
    patch.setattr(liveness, "BEAT", beat)


def _break_connections(patch: pytest.MonkeyPatch, is_away: Callable[[], bool]) -> None:
    connect = find.SharedRedis.client

    def reach(shared: find.SharedRedis) -> Any:
        if is_away():
            raise ConnectionError("away")
        return connect(shared)

    patch.setattr(find.SharedRedis, "client", reach)


def _snapshot(name: str, slots: int, score: float | None, waiting: float) -> snapshot.Worker:
    return snapshot.Worker(
        hostname=name,
        ready_slots={"model": slots},
        scores={"model": snapshot.Score(value=score)},
        tallies={"model": snapshot.Counters(waiting=waiting, arrived_inputs=7, mean=2.0)},
    )


def leave_record(
    app: Celery, start: str, number: int, task_id: str, embed: Any = None, **request: Any
) -> None:
    """Leave what a replica of a worker records of an input that is acknowledged as it begins.

    Args:
        embed: the last of the three parts of its message's body.
        request: headers of its message.
    """
    record = early_acks.write({"id": task_id, "task": "proj.embed", **request}, embed)
    app.backend.client.hset(early_acks.records_key(app.backend, start), str(number), record)


def hold(
    client: redis.Redis, incarnation: str, most: int, queue: str = "celery", first: int = 1
) -> list[bytes]:
    """Take messages from a queue as a worker does, which then holds them, and return them."""
    keys = (f"gw:hold:{incarnation}", f"gw:dead:{incarnation}", queue, f"{queue}\x06\x163")
    taken: Any = client.eval(holds.TAKE, len(keys), *keys, str(first), str(most), "1000000", "2")
    return list(taken[1::2])


@contextlib.contextmanager
def pages_of(size: int) -> Iterator[None]:
    """Have messages given back in smaller groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holds, "_PAGE", size)
        yield


class Answerer:
    """What does the rest for lost workers in the worker ``start``, driven by hand."""

    def __init__(self, app: Celery, start: str) -> None:
        self._inside = lost_workers.LostWorkers(app, start, 5.0)
        self.start = start

    def take_over(self, lost: str) -> None:
        """Take over what a lost worker began, and be killed before any of it is answered."""
        assert self._inside.early is not None
        self._inside.early.take_over(lost)

    def answer(self, *incarnations: str) -> bool:
        """Answer for lost workers, in this thread; whether nothing is left of all."""
        self._inside.answer(dict.fromkeys(incarnations, False))
        return set(incarnations) <= set(self._inside.answered)

    @property
    def done(self) -> list[str]:
        """The lost workers of which nothing is left."""
        return list(self._inside.answered)

    @property
    def tries_again(self) -> bool:
        """Whether its thread would have another round, without being asked."""
        return math.isfinite(self._inside.period)

    def forget(self, numbers: list[int]) -> bool:
        """Have records of one's own removed, and end; whether that worked."""
        self._inside.forget(numbers)
        return self._inside.close()


class Counts:
    """The counts of poison inputs, as the pool of one worker asks for them."""

    def __init__(self, inside: poison_counts.Shared) -> None:
        self._inside = inside

    def record(self, task_id: str, *, is_return: bool) -> None:
        if is_return:
            self._inside.record_return(task_id)
        else:
            self._inside.record(task_id, 1)

    def asked(self, task_id: str, after: Callable[[int], None]) -> tuple[Any, Any]:
        """Return what Redis has counted of an input: deaths and returns; ``None``: unknown."""
        self._inside.ask(1, task_id)
        after(1)
        ((_, _, deaths, returns),) = self._inside.answers()
        return deaths, returns


def counts_of(member: Member) -> Counts:
    assert member._inside.counts is not None
    return Counts(member._inside.counts)


def holders(app: Celery, ttl: float) -> held.Holders:
    """Return what an operator's command asks about holds."""
    made = held.holders(app, ttl)
    assert made is not None
    return made


def total(lengths: Mapping[str, tuple[int, int | None]], queues: list[str]) -> tuple[Any, Any]:
    """The messages and the consumers of several queues together."""
    made = {queue: queue_lengths.Length(*length) for queue, length in lengths.items()}
    return dataclasses.astuple(queue_lengths.total(made, queues))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an autoscaler goes by: messages and consumers by queue, and the other workers."""

    lengths: dict[str, tuple[int, int | None]] | None
    others: list[str] | None


class Member:
    """One worker among the others."""

    def __init__(
        self, app: Celery, name: str, queues: Mapping[str, list[str]], limited: Any, ttl: float
    ) -> None:
        self.name = name
        #: Why its last exchange failed.
        self.error: Exception | None = None
        self._inside = membership.Membership(app, name, queues, limited, ttl)
        self.close = self._inside.close
        self.leave = self._inside.leave
        self.begin = self._inside.begin
        self._told = snapshot.Worker(hostname=name)
        self.at_zero = self._inside.at_zero
        self.read_others = self._inside.read_others
        self.waits_for_broker = self._inside.expect_no_turn

    @property
    def incarnation(self) -> str:
        return self._inside.holds.incarnation

    @property
    def start(self) -> str:
        """The start of the worker; ``incarnation`` is another after it was declared lost."""
        return self._inside.holds.start

    @property
    def outage(self) -> str:
        """Why none of its inputs may start."""
        return self._inside.holds.outage

    def acknowledge(self, number: int) -> None:
        """Have an input answered, which is not told to Redis yet."""
        self._inside.holds.acknowledged.append(holds.name(self.incarnation, number))

    @property
    def records_early(self) -> bool:
        """Whether inputs that are acknowledged as they begin are answered if it is lost."""
        return self._inside.early_start is not None

    @property
    def has_thread(self) -> bool:
        return self._inside._thread is not None

    @property
    def is_alone(self) -> bool:
        return self._inside.is_alone

    @property
    def others(self) -> dict[str, Any]:
        """The records of the others, by their node names."""
        return {other.worker: other for other in self._inside.others}

    def tell(
        self,
        *,
        slots: int = 0,
        score: float | None = None,
        waiting: float = 0.0,
        is_scaled: bool = True,
    ) -> None:
        """Have the others know of slots that are READY, of the score and the work of ``model``."""
        self._told = _snapshot(self.name, slots, score, waiting)
        self.turn()
        self._inside.tell(self._told, Size(capacity=4) if is_scaled else None)

    def turn(self) -> None:
        """Have the loop of the worker turn, as it does once a second."""
        self._inside.observe(self._told)

    def follow(self, on_read: Callable[[], None], *, starts: bool = False) -> None:
        """Do as an autoscaler does as it begins; the thread runs only where a test ``starts`` it.

        Where it does not, the test itself lets the rounds come.
        """
        with pytest.MonkeyPatch.context() as patch:
            if not starts:
                patch.setattr(self._inside, "start", lambda: None)
                patch.setattr(self._inside, "wake", lambda: None)
            self._inside.follow(on_read)

    def reading(self) -> Reading | None:
        """What was read last; ``None`` when that says nothing about now."""
        if (latest := self._inside.latest()) is None:
            return None
        lengths, others = latest.lengths, latest.others
        return Reading(
            None if lengths is None else {q: (n.messages, n.consumers) for q, n in lengths.items()},
            None if others is None else sorted(other.worker for other in others),
        )

    def run_round(self) -> None:
        self.error = None
        try:
            self._inside.run_round()
        except Exception as exc:
            self.error = exc

    def hang(self, patch: pytest.MonkeyPatch, wait: Callable[[], None]) -> None:
        """Have its exchange with Redis take as long as ``wait``, and fail."""

        def exchange(*_: Any, **__: Any) -> None:
            wait()
            raise ConnectionError("gone")

        patch.setattr(self._inside, "_exchange", exchange)


# -- the end of what is known of the inside --

QUEUES = {"model": ["gpu.A100.model"], "": ["celery"]}
CLOCK = "test:now"


class Project:
    """Its workers are driven by hand, once a second; all else is as in a worker.

    Args:
        client: of the Redis that all know; ``None`` where the broker is none.
        ttl: of each worker.
    """

    def __init__(self, app: Celery, client: redis.Redis | None, ttl: float = 15.0) -> None:
        self.app, self._client, self.ttl = app, client, ttl
        self.workers: dict[str, Member] = {}
        self.now, self.shift, self.is_away = 1000.0, 0.0, False
        #: Called whenever a worker looks at its clock.
        self.on_clock: Callable[[], None] = lambda: None

    @property
    def client(self) -> redis.Redis:
        assert self._client is not None
        return self._client

    @contextlib.contextmanager
    def running(self) -> Iterator[Project]:
        with pytest.MonkeyPatch.context() as patch:
            _stop_clocks(patch, self._clock)
            _break_connections(patch, lambda: self.is_away)
            yield self
            self.close()

    def _clock(self) -> float:
        self.on_clock()
        return self.now

    def add(
        self,
        name: str,
        limited: Mapping[str, Mapping[str, int]] | None = None,
        *,
        reads: bool = True,
        **told: Any,
    ) -> Member:
        """A worker comes.

        Args:
            limited: queues whose callers are told how long an input would wait.
            reads: whether something in it depends on the records of the others.
            told: see ``Member.tell``.
        """
        self.workers[name] = member = Member(self.app, name, QUEUES, limited or {}, self.ttl)
        member.tell(**told)
        if reads:
            member.read_others()
        return member

    def after(
        self, seconds: int = 1, frozen: Collection[str] = (), stuck: Collection[str] = ()
    ) -> None:
        """Let seconds pass.

        Args:
            frozen: workers that stand still.
            stuck: workers whose loop stands still.
        """
        for _ in range(seconds):
            self.now += 1.0
            if self._client is not None:
                with contextlib.suppress(redis.RedisError):  # it refuses, and answers no beat
                    self._client.set(CLOCK, 1e9 + self.now + self.shift)
            for name, worker in self.workers.items():
                if name not in {*frozen, *stuck}:
                    worker.turn()
                if name not in frozen:
                    worker.run_round()

    def known(self, name: str) -> list[str]:
        """The others, as a worker knows them."""
        return sorted(self.workers[name].others)

    def tombstones(self) -> set[str]:
        keys: Any = self.client.keys("gw:dead:*")
        return {key.decode().removeprefix("gw:dead:") for key in keys}

    def alive(self) -> set[str]:
        names: Any = self.client.zrange("gw:alive", 0, -1)
        return {name.decode() for name in names}

    def close(self) -> None:
        self.is_away = False
        for worker in self.workers.values():
            worker.leave()
