from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.common import QoS

from gw_celery.protocol.snapshot import Worker
from gw_celery.worker import gate

EMBED, CLASSIFY, PLAIN = "gpu.A100.embed", "gpu.A100.classify", "mail"
SERVICES = {EMBED: "embed", CLASSIFY: "classify"}


class Pool:
    """A pool as the gate sees it: slots that are READY, and inputs that wait for one."""

    def __init__(self) -> None:
        self.ready: dict[str, int] = {"embed": 0, "classify": 0, "": 0}
        self.waiting: Counter[str] = Counter()
        self.bands: dict[str, str] = {}
        self.lost = ""
        self.gate: gate.Gate | None = None

    def snapshot(self) -> Worker:
        return Worker(
            hostname="gpu@host",
            ready_slots=dict(self.ready),
            waiting_inputs=dict(self.waiting),
            outage=self.lost,
            bands=dict(self.bands),
        )


class Consumer:
    """A worker's consumer at the moment when Celery starts its steps after ``Tasks``."""

    def __init__(self, app: Celery, connection: Any, prefetch: int = 1, multiplier: int = 1):
        self.task_consumer = app.amqp.TaskConsumer(connection.channel())
        self.task_consumer.consume()
        #: The prefetch counts that the broker was told.
        self.told: list[int] = []
        self.qos = QoS(self._tell, prefetch * multiplier)
        self.initial_prefetch_count = prefetch * multiplier
        self.prefetch_multiplier = multiplier
        self.app = app
        self.connection = connection
        self.soon: list[Callable[[], None]] = []

    def _tell(self, prefetch_count: int) -> None:
        self.told.append(prefetch_count)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        """The event loop comes to what was queued, which is one thing at most."""
        assert len(self.soon) <= 1
        while self.soon:
            self.soon.pop()()

    @property
    def consumed(self) -> set[str]:
        return {
            name for name in (EMBED, CLASSIFY, PLAIN) if self.task_consumer.consuming_from(name)
        }


@pytest.fixture
def connection(celery_app: Celery) -> Iterator[Any]:
    with celery_app.connection_for_read() as connection:
        yield connection


@pytest.fixture
def queues(celery_app: Celery) -> Any:
    celery_app.amqp.queues.select([EMBED, CLASSIFY, PLAIN])
    return celery_app.amqp.queues


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def closed(queues: Any, pool: Pool) -> gate.Gate:
    made = gate.Gate(queues, SERVICES, pool)
    made.close_all()
    pool.gate = made
    return made


@pytest.fixture
def consumer(celery_app: Celery, connection: Any, closed: gate.Gate) -> Consumer:
    """A consumer to which the closed gate is attached."""
    made = Consumer(celery_app, connection)
    closed.attach(made)
    return made


def everything_is_ready(pool: Pool) -> None:
    pool.ready.update({"embed": 2, "classify": 1, "": 1})


def test_a_worker_starts_without_any_queue(
    consumer: Consumer, closed: gate.Gate, queues: Any
) -> None:
    assert consumer.consumed == set()
    assert list(queues.consume_from) == []
    assert closed.open_queues() == ()
    assert closed.closed_queues() == (CLASSIFY, EMBED, PLAIN)


def test_a_queue_opens_when_a_replica_is_ready_for_it(
    consumer: Consumer, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    pool.ready["embed"] = 2
    closed.apply()
    assert consumer.consumed == {EMBED}
    assert list(queues.consume_from) == [EMBED]
    assert closed.open_queues() == (EMBED,)


def test_a_queue_closes_when_the_last_replica_is_gone(
    consumer: Consumer, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    everything_is_ready(pool)
    closed.apply()
    assert consumer.consumed == {EMBED, CLASSIFY, PLAIN}
    pool.ready["classify"] = 0
    closed.apply()
    assert consumer.consumed == {EMBED, PLAIN}
    assert sorted(queues.consume_from) == [EMBED, PLAIN]


def test_a_service_that_piles_up_closes_its_own_queue_until_it_has_caught_up(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    pool.ready.update({"embed": 8, "classify": 1, "": 1})
    closed.apply()
    pool.waiting["embed"] = 2
    closed.apply()
    assert EMBED in consumer.consumed, "a few may wait, so that no slot is ever idle"
    pool.waiting["embed"] = 9
    closed.apply()
    assert consumer.consumed == {CLASSIFY, PLAIN}
    pool.waiting["embed"] = 1
    closed.apply()
    assert consumer.consumed == {CLASSIFY, PLAIN}
    pool.waiting["embed"] = 0
    closed.apply()
    assert consumer.consumed == {EMBED, CLASSIFY, PLAIN}


# -- results that cannot be stored --


def test_nothing_is_consumed_while_results_cannot_be_stored(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    pool.ready["classify"] = 0
    closed.apply()
    pool.lost = "no route to host"
    closed.apply()
    assert consumer.consumed == set()
    assert closed.closed_queues() == (CLASSIFY, EMBED, PLAIN)
    assert consumer.qos.value == 3, "what is prefetched stays here, and still counts"
    pool.lost = ""
    closed.apply()
    assert consumer.consumed == {EMBED, PLAIN}


def test_an_outage_is_told_once_and_so_is_its_end(
    consumer: Consumer, closed: gate.Gate, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    everything_is_ready(pool)
    closed.apply()
    caplog.clear()
    for reason in ("no route to host", "time-out", "", ""):
        pool.lost = reason
        closed.apply()
    told = [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]
    assert told == [
        "no queue is consumed until results can be stored again: no route to host",
        "queues are consumed again: results can be stored",
    ]


def test_no_connection_and_no_command_opens_a_queue_in_an_outage(
    celery_app: Celery, connection: Any, consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    pool.lost = "no route to host"
    closed.apply()
    closed.detach()
    following = Consumer(celery_app, connection)
    closed.attach(following)
    closed.add("added")
    assert not following.task_consumer.consuming_from("added")
    assert following.consumed == set()
    pool.lost = ""
    closed.apply()
    assert following.task_consumer.consuming_from("added")
    assert following.consumed == {EMBED, CLASSIFY, PLAIN}


# -- changes while messages are delivered --


def test_a_request_is_met_once_and_where_celery_talks_to_the_broker(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    closed.request()
    closed.request()
    assert consumer.consumed == set()
    consumer.turn()
    assert consumer.consumed == {EMBED, CLASSIFY, PLAIN}
    pool.ready["embed"] = 0
    closed.request()
    consumer.turn()
    assert consumer.consumed == {CLASSIFY, PLAIN}


def test_a_request_without_a_broker_is_met_at_once(
    celery_app: Celery, connection: Any, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    closed.request()
    assert closed.open_queues() == (CLASSIFY, EMBED, PLAIN)
    assert Consumer(celery_app, connection).consumed == {EMBED, CLASSIFY, PLAIN}


def test_a_request_that_was_lost_with_its_consumer_holds_up_no_later_one(
    celery_app: Celery, connection: Any, consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    closed.request()
    closed.detach()
    following = Consumer(celery_app, connection)
    closed.attach(following)
    everything_is_ready(pool)
    closed.request()
    following.turn()
    assert following.consumed == {EMBED, CLASSIFY, PLAIN}


# -- a broker that comes and goes --


def test_the_next_consumer_follows_what_changed_while_the_broker_was_away(
    celery_app: Celery, connection: Any, consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    pool.ready.update({"classify": 1, "": 1})
    closed.apply()
    closed.detach()
    pool.ready.update({"embed": 2, "classify": 0})
    closed.apply()
    following = Consumer(celery_app, connection)
    closed.attach(following)
    assert following.consumed == {EMBED, PLAIN}
    assert consumer.consumed == {CLASSIFY, PLAIN}, "a lost connection is spoken to no more"


def test_a_consumer_that_has_no_channel_yet_is_no_obstacle(
    consumer: Consumer, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    consumer.task_consumer = None
    pool.ready["embed"] = 1
    closed.apply()
    assert list(queues.consume_from) == [EMBED]
    pool.ready["embed"] = 0
    closed.apply()
    assert list(queues.consume_from) == []


def test_the_next_consumer_reads_what_could_not_be_told_to_a_lost_broker(
    celery_app: Celery,
    connection: Any,
    consumer: Consumer,
    closed: gate.Gate,
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(consumer.task_consumer, "add_queue", lost)
    everything_is_ready(pool)
    with pytest.raises(ConnectionResetError):
        closed.apply()
    closed.detach()
    following = Consumer(celery_app, connection)
    closed.attach(following)
    assert following.consumed == {EMBED, CLASSIFY, PLAIN}


def test_the_step_attaches_the_gate_and_detaches_it(
    celery_app: Celery, connection: Any, closed: gate.Gate, pool: Pool
) -> None:
    consumer: Any = Consumer(celery_app, connection)
    consumer.pool, consumer.steps = pool, []
    step = gate.GateStep(consumer)
    step.start(consumer)
    pool.ready["embed"] = 1
    closed.apply()
    assert consumer.consumed == {EMBED}
    step.stop(consumer)
    pool.ready["embed"] = 0
    closed.apply()
    assert consumer.consumed == {EMBED}, "a lost connection is spoken to no more"


# -- add_consumer and cancel_consumer --


def test_a_queue_that_was_cancelled_stays_closed_whatever_is_ready(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    closed.remove(EMBED)
    everything_is_ready(pool)
    closed.apply()
    assert consumer.consumed == {CLASSIFY, PLAIN}
    assert EMBED not in closed.closed_queues()


def test_a_queue_that_was_added_closes_and_opens_with_the_plain_slots(
    consumer: Consumer, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    everything_is_ready(pool)
    consumer.task_consumer.add_queue(queues.select_add("added"))
    closed.add("added")
    pool.ready[""] = 0
    closed.apply()
    assert not consumer.task_consumer.consuming_from("added")
    pool.ready[""] = 1
    closed.apply()
    assert consumer.task_consumer.consuming_from("added")


def test_a_service_queue_that_is_cancelled_and_added_again_follows_its_service(
    consumer: Consumer, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    everything_is_ready(pool)
    closed.apply()
    queues.deselect(EMBED)
    closed.remove(EMBED)
    consumer.task_consumer.add_queue(queues.select_add(EMBED))
    closed.add(EMBED)
    pool.ready["embed"] = 0
    closed.apply()
    assert EMBED not in consumer.consumed


def test_a_queue_that_was_added_survives_a_reconnect_where_celery_did_not_select_it(
    celery_app: Celery, connection: Any, consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    """Celery 5.6 adds a queue that was deselected to the consumer only."""
    everything_is_ready(pool)
    closed.apply()
    closed.remove(PLAIN)
    celery_app.amqp.queues.deselect(PLAIN)
    closed.add(PLAIN)
    closed.detach()
    following = Consumer(celery_app, connection)
    closed.attach(following)
    assert PLAIN in following.consumed


# -- prefetch --


def test_the_prefetch_count_is_the_ready_slots(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    assert consumer.qos.value == 1
    everything_is_ready(pool)
    closed.apply()
    assert consumer.qos.value == 4
    pool.ready.update({"embed": 6})
    closed.apply()
    assert consumer.qos.value == 8
    pool.ready.update({"embed": 0, "classify": 0, "": 0})
    closed.apply()
    assert consumer.qos.value == 1, "0 would be no limit at all"


def test_inputs_that_wait_take_no_credit_from_other_services(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    pool.waiting["embed"] = 5
    closed.apply()
    assert consumer.qos.value == 9
    pool.waiting["embed"] = 0
    closed.apply()
    assert consumer.qos.value == 4


def test_a_worker_of_one_service_takes_its_slots_and_never_closes_for_being_full(
    celery_app: Celery, connection: Any, pool: Pool
) -> None:
    celery_app.amqp.queues.select([EMBED])
    made = gate.Gate(celery_app.amqp.queues, {EMBED: "embed"}, pool)
    consumer = Consumer(celery_app, connection)
    pool.ready.update({"embed": 3, "": 1})
    pool.waiting["embed"] = 50
    made.attach(consumer)
    assert consumer.consumed == {EMBED}
    assert consumer.qos.value == 3


def test_the_queue_of_beats_tasks_has_no_credit_of_its_own_and_closes_no_other(
    celery_app: Celery, connection: Any, pool: Pool
) -> None:
    celery_app.amqp.queues.select([EMBED, "gw.control"])
    made = gate.Gate(celery_app.amqp.queues, {EMBED: "embed"}, pool)
    consumer = Consumer(celery_app, connection)
    pool.ready.update({"embed": 3, "": 1})
    pool.waiting["embed"] = 50
    made.attach(consumer)
    assert consumer.qos.value == 3
    assert made.open_queues() == (EMBED, "gw.control")
    pool.ready.update({"embed": 0, "": 0})
    made.apply()
    assert made.closed_queues() == (EMBED, "gw.control")


def test_tasks_with_an_eta_keep_what_celery_added_for_them(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    closed.apply()
    consumer.qos.increment_eventually(10)
    pool.ready["embed"] = 4
    closed.apply()
    assert consumer.qos.value == 16
    pool.ready.update({"embed": 0, "classify": 0})
    closed.apply()
    assert consumer.qos.value == 11


def test_the_broker_is_told_of_another_prefetch_count_at_once_and_of_the_same_not(
    consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    # Celery's loop does it, too, once it has waited for the next message or timer.
    consumer.told.clear()
    everything_is_ready(pool)
    closed.apply()
    assert consumer.told == [4]
    closed.apply()
    assert consumer.told == [4]


def test_a_project_that_wants_no_prefetch_limit_keeps_none(
    celery_app: Celery, connection: Any, closed: gate.Gate, pool: Pool
) -> None:
    consumer = Consumer(celery_app, connection, multiplier=0)
    closed.attach(consumer)
    everything_is_ready(pool)
    closed.apply()
    assert consumer.qos.value == 0
    assert consumer.consumed == {EMBED, CLASSIFY, PLAIN}


def test_each_consumer_starts_from_its_own_prefetch_count(
    celery_app: Celery, connection: Any, consumer: Consumer, closed: gate.Gate, pool: Pool
) -> None:
    everything_is_ready(pool)
    closed.apply()
    closed.detach()
    following = Consumer(celery_app, connection, prefetch=4)
    closed.attach(following)
    assert following.qos.value == 4
    pool.ready["embed"] = 0
    closed.apply()
    assert following.qos.value == 2
    assert consumer.qos.value == 4


# -- a broker that counts for each queue, from when it is consumed (quorum queues) --


class Counting:
    """A channel's consumer that notes with which prefetch count each queue is consumed."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self._prefetch = 1
        self.counts: dict[str, int] = {}
        self.consumed: list[str] = []
        self.arguments: dict[str, Any] = {}

    def qos(self, prefetch_count: int, apply_global: bool) -> None:
        assert not apply_global
        self._prefetch = prefetch_count

    def add_queue(self, queue: Any) -> None:
        self._made.add_queue(queue)

    def consuming_from(self, name: str) -> bool:
        return bool(self._made.consuming_from(name))

    def consume(self) -> None:
        for queue in self._made.queues:
            if not self._made.consuming_from(queue):
                self.counts[queue.name] = self._prefetch
                self.arguments[queue.name] = queue.consumer_arguments
                self.consumed.append(queue.name)
        self._made.consume()

    def cancel_by_queue(self, name: str) -> None:
        self.counts.pop(name, None)
        self._made.cancel_by_queue(name)


@pytest.fixture
def counting(celery_app: Celery, connection: Any, closed: gate.Gate, pool: Pool) -> Counting:
    """A consumer of quorum queues, all of them open."""
    return opened(celery_app, connection, closed, pool, is_per_queue=True)


def opened(
    app: Celery, connection: Any, closed: gate.Gate, pool: Pool, *, is_per_queue: bool = False
) -> Counting:
    made = Consumer(app, connection)
    made.task_consumer = Counting(made.task_consumer)
    closed.attach(made, is_per_queue=is_per_queue)
    everything_is_ready(pool)
    closed.apply()
    return made.task_consumer


def test_each_quorum_queue_is_consumed_with_the_slots_of_its_service(counting: Counting) -> None:
    assert counting.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}


def test_a_quorum_queue_is_consumed_anew_when_its_slots_change_and_no_other(
    counting: Counting, closed: gate.Gate, pool: Pool
) -> None:
    counting.consumed.clear()
    pool.ready["embed"] = 6
    closed.apply()
    closed.apply()
    assert counting.counts == {EMBED: 6, CLASSIFY: 1, PLAIN: 1}
    assert counting.consumed == [EMBED]


def test_a_quorum_queue_needs_no_closing_when_its_service_is_full(
    counting: Counting, closed: gate.Gate, pool: Pool
) -> None:
    pool.waiting["embed"] = 5
    closed.apply()
    assert counting.counts[EMBED] == 2


def test_a_quorum_queue_without_a_replica_is_closed_and_opens_again(
    counting: Counting, closed: gate.Gate, pool: Pool
) -> None:
    pool.ready["embed"] = 0
    closed.apply()
    assert counting.counts == {CLASSIFY: 1, PLAIN: 1}
    pool.ready["embed"] = 2
    closed.apply()
    assert counting.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}


def test_the_next_connection_has_the_counts_of_quorum_queues_too(
    counting: Counting, closed: gate.Gate, pool: Pool, celery_app: Celery, connection: Any
) -> None:
    closed.detach()
    following = Consumer(celery_app, connection)
    following.task_consumer = Counting(following.task_consumer)
    closed.attach(following, is_per_queue=True)
    assert following.task_consumer.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}


# -- a broker that prefers some consumers to others (RabbitMQ) --


@pytest.fixture
def preferring(celery_app: Celery, connection: Any, closed: gate.Gate, pool: Pool) -> Counting:
    """A consumer whose queues are all open."""
    return opened(celery_app, connection, closed, pool)


def test_a_queue_is_consumed_with_the_priority_of_its_service(
    preferring: Counting, closed: gate.Gate, pool: Pool
) -> None:
    assert preferring.arguments == {EMBED: None, CLASSIFY: None, PLAIN: None}
    pool.bands = {"embed": "quick", "classify": "slow"}
    closed.apply()
    assert preferring.arguments == {
        EMBED: {"x-priority": 1},
        CLASSIFY: {"x-priority": -1},
        PLAIN: None,
    }


def test_a_queue_is_consumed_anew_when_its_priority_changes_and_no_other(
    preferring: Counting, closed: gate.Gate, pool: Pool
) -> None:
    preferring.consumed.clear()
    pool.bands["embed"] = "slow"
    closed.apply()
    closed.apply()
    assert preferring.consumed == [EMBED]
    pool.bands["embed"] = "middle"
    closed.apply()
    assert preferring.consumed == [EMBED, EMBED]
    assert preferring.arguments[EMBED] is None


def test_a_queue_that_opens_again_has_its_priority(
    preferring: Counting, closed: gate.Gate, pool: Pool
) -> None:
    pool.ready["embed"] = 0
    closed.apply()
    preferring.consumed.clear()
    pool.bands["embed"] = "quick"
    pool.ready["embed"] = 2
    closed.apply()
    assert preferring.consumed == [EMBED]
    assert preferring.arguments[EMBED] == {"x-priority": 1}


def test_the_next_connection_has_the_priorities_too(
    preferring: Counting, closed: gate.Gate, pool: Pool, celery_app: Celery, connection: Any
) -> None:
    pool.bands["embed"] = "quick"
    closed.apply()
    closed.detach()
    following = Consumer(celery_app, connection)
    following.task_consumer = Counting(following.task_consumer)
    closed.attach(following)
    assert following.task_consumer.arguments[EMBED] == {"x-priority": 1}
    assert following.task_consumer.consuming_from(PLAIN)


def test_a_queue_that_add_consumer_opens_has_its_priority(
    preferring: Counting, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    closed.remove(EMBED)
    preferring.cancel_by_queue(EMBED)
    pool.bands["embed"] = "quick"
    preferring.add_queue(queues[EMBED])
    preferring.consume()
    closed.add(EMBED)
    assert preferring.arguments[EMBED] == {"x-priority": 1}


def test_what_the_user_says_of_a_consumer_is_kept(
    preferring: Counting, closed: gate.Gate, pool: Pool, queues: Any
) -> None:
    queues[EMBED].consumer_arguments = {"x-cancel-on-ha-failover": True}
    queues[CLASSIFY].consumer_arguments = {"x-priority": 7}
    preferring.consumed.clear()
    pool.bands = {"embed": "quick", "classify": "quick"}
    closed.apply()
    assert preferring.consumed == [EMBED]
    assert preferring.arguments[EMBED] == {"x-cancel-on-ha-failover": True, "x-priority": 1}
    assert queues[EMBED].consumer_arguments == {"x-cancel-on-ha-failover": True}


def test_a_quorum_queue_is_consumed_anew_with_its_count_and_its_priority(
    counting: Counting, closed: gate.Gate, pool: Pool
) -> None:
    counting.consumed.clear()
    pool.bands["embed"] = "slow"
    closed.apply()
    closed.apply()
    assert counting.consumed == [EMBED]
    assert counting.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}
    assert counting.arguments[EMBED] == {"x-priority": -1}
