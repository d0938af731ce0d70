"""Which queues a worker consumes, and with which prefetch count, as its slots come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery.worker.consumer import Consumer

from tests.unit.worker.consuming import CLASSIFY, EMBED, PLAIN, Channel, Consuming, consuming

ALL = {"embed": 2, "classify": 1, "plain": 1}
NONE = dict.fromkeys(ALL, 0)


@pytest.fixture
def worker() -> Iterator[Consuming]:
    """A worker with a connection, of which no replica is READY."""
    with consuming() as made:
        made.connect()
        yield made


def test_a_worker_starts_without_any_queue(worker: Consuming) -> None:
    assert worker.consumed == set()
    assert worker.selected == []
    assert (worker.opened, worker.closed) == ((), (PLAIN, CLASSIFY, EMBED))


def test_a_queue_opens_when_a_replica_is_ready_for_it(worker: Consuming) -> None:
    worker.sees(embed=2)
    assert worker.consumed == {EMBED}
    assert worker.selected == [EMBED]
    assert worker.opened == (EMBED,)


def test_a_queue_closes_when_the_last_replica_is_gone(worker: Consuming) -> None:
    worker.sees(**ALL)
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}
    worker.sees(classify=0)
    assert worker.consumed == {EMBED, PLAIN}
    assert worker.selected == [PLAIN, EMBED]


def test_a_service_that_piles_up_closes_its_own_queue_until_it_has_caught_up(
    worker: Consuming,
) -> None:
    worker.sees(embed=8, classify=1, plain=1)
    worker.sees(waiting={"embed": 2})
    assert EMBED in worker.consumed, "a few may wait, so that no slot is ever idle"
    worker.sees(waiting={"embed": 9})
    assert worker.consumed == {CLASSIFY, PLAIN}
    worker.sees(waiting={"embed": 1})
    assert worker.consumed == {CLASSIFY, PLAIN}
    worker.sees(waiting={})
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


# -- results that cannot be stored --


def test_nothing_is_consumed_while_results_cannot_be_stored(worker: Consuming) -> None:
    worker.sees(embed=2, plain=1)
    worker.sees(outage="no route to host")
    assert worker.consumed == set()
    assert worker.closed == (PLAIN, CLASSIFY, EMBED)
    assert worker.prefetch == 3, "what is prefetched stays here, and still counts"
    worker.sees(outage="")
    assert worker.consumed == {EMBED, PLAIN}


def test_an_outage_is_told_once_and_so_is_its_end(
    worker: Consuming, caplog: pytest.LogCaptureFixture
) -> None:
    worker.sees(**ALL)
    caplog.clear()
    for reason in ("no route to host", "time-out", "", ""):
        worker.sees(outage=reason)
    told = [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]
    assert told == [
        "no queue is consumed until results can be stored again: no route to host",
        "queues are consumed again: results can be stored",
    ]


def test_no_connection_and_no_command_opens_a_queue_in_an_outage(worker: Consuming) -> None:
    worker.sees(**ALL, outage="no route to host")
    worker.disconnect()
    worker.connect()
    worker.add("added")
    assert worker.consumed == set()
    worker.sees(outage="")
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN, "added"}


# -- changes while messages are delivered --


def test_a_change_is_followed_where_celery_talks_to_the_broker(worker: Consuming) -> None:
    worker.sees(**ALL)
    worker.sees(embed=0)
    worker.pool.slots_changed()
    worker.sees(embed=2, waiting={"embed": 1})
    assert worker.consumed == {CLASSIFY, PLAIN}
    worker.sees(waiting={})
    worker.pool.slots_changed()
    worker.pool.slots_changed()
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


def test_nothing_is_asked_of_the_broker_in_the_middle_of_a_delivery(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker, "turn", lambda: None)
        worker.sees(**ALL)
        assert worker.consumed == set()
    worker.turn()
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


def test_a_change_without_a_broker_is_followed_at_once(worker: Consuming) -> None:
    worker.disconnect()
    worker.sees(**ALL)
    assert worker.opened == (PLAIN, CLASSIFY, EMBED)
    worker.connect()
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


def test_many_changes_are_followed_by_one_look_at_the_slots(worker: Consuming) -> None:
    looks: list[Any] = []
    measure = worker.pool.snapshot
    worker.pool.snapshot = lambda: looks.append(None) or measure()
    for _ in range(3):
        worker.pool.slots_changed()
    assert looks == []
    worker.turn()
    assert len(looks) == 1


def test_a_change_that_was_lost_with_its_connection_holds_up_no_later_one(
    worker: Consuming,
) -> None:
    worker.pool.slots_changed()
    worker.disconnect()
    worker.connect()
    worker.sees(**ALL)
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


# -- a broker that comes and goes --


def test_the_next_connection_follows_what_changed_while_the_broker_was_away(
    worker: Consuming,
) -> None:
    worker.sees(classify=1, plain=1)
    lost = worker.channel
    worker.disconnect()
    worker.sees(embed=2, classify=0)
    worker.connect()
    assert worker.consumed == {EMBED, PLAIN}
    assert lost.consuming_from(CLASSIFY), "a lost connection is spoken to no more"
    assert not lost.consuming_from(EMBED)


def test_a_consumer_that_has_no_channel_yet_is_no_obstacle(worker: Consuming) -> None:
    worker.consumer.task_consumer = None
    worker.sees(embed=1)
    assert worker.selected == [EMBED]
    worker.sees(embed=0)
    assert worker.selected == []


def test_the_next_connection_reads_what_could_not_be_told_to_a_lost_broker(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(worker.channel, "add_queue", lost, raising=False)
    worker.sees(**ALL)
    assert worker.consumed == set()
    worker.disconnect()
    worker.connect()
    assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


# -- add_consumer and cancel_consumer --


def test_a_queue_that_was_cancelled_stays_closed_whatever_is_ready(worker: Consuming) -> None:
    worker.cancel(EMBED)
    worker.sees(**ALL)
    assert worker.consumed == {CLASSIFY, PLAIN}
    assert EMBED not in worker.closed


@pytest.mark.parametrize("queue", [EMBED, PLAIN, "added"])
def test_a_queue_that_is_added_before_anything_is_ready_is_not_consumed_yet(
    worker: Consuming, queue: str
) -> None:
    worker.add(queue)
    assert worker.consumed == set()
    assert queue in worker.closed


def test_a_queue_that_was_added_closes_and_opens_with_the_plain_slots(worker: Consuming) -> None:
    worker.sees(**ALL)
    worker.add("added")
    assert "added" in worker.consumed
    assert worker.opened == ("added", PLAIN, CLASSIFY, EMBED)
    worker.sees(plain=0)
    assert "added" not in worker.consumed
    worker.sees(plain=1)
    assert "added" in worker.consumed


def test_a_service_queue_that_is_cancelled_and_added_again_follows_its_service(
    worker: Consuming,
) -> None:
    worker.sees(**ALL)
    worker.cancel(EMBED)
    worker.add(EMBED)
    assert EMBED in worker.consumed
    worker.sees(embed=0)
    assert EMBED not in worker.consumed


@pytest.mark.parametrize("selects", [True, False])
def test_a_queue_that_was_added_survives_a_reconnect(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch, selects: bool
) -> None:
    """Celery 5.6 adds a queue that was deselected to the consumer only."""

    def add_only(self: Any, queue: str, *args: Any, **options: Any) -> None:
        self.task_consumer.add_queue(self.app.amqp.queues[queue])
        self.task_consumer.consume()

    if not selects:
        monkeypatch.setattr(Consumer, "add_task_queue", add_only)
    worker.sees(**ALL)
    worker.cancel(PLAIN)
    worker.add(PLAIN)
    worker.disconnect()
    worker.connect()
    assert PLAIN in worker.consumed


# -- prefetch --


def test_the_prefetch_count_is_the_ready_slots(worker: Consuming) -> None:
    assert worker.prefetch == 1
    worker.sees(**ALL)
    assert worker.prefetch == 4
    worker.sees(embed=6)
    assert worker.prefetch == 8
    worker.sees(**NONE)
    assert worker.prefetch == 1, "0 would be no limit at all"


def test_inputs_that_wait_take_no_credit_from_other_services(worker: Consuming) -> None:
    worker.sees(**ALL, waiting={"embed": 5})
    assert worker.prefetch == 9
    worker.sees(waiting={})
    assert worker.prefetch == 4


def test_a_worker_of_one_service_takes_its_slots_and_never_closes_for_being_full() -> None:
    with consuming({"embed": 3}) as worker:
        worker.connect()
        worker.cancel(PLAIN)
        worker.sees(embed=3, plain=1)
        worker.sees(waiting={"embed": 50})
        assert worker.consumed == {EMBED}
        assert worker.prefetch == 3


def test_the_queue_of_beats_tasks_has_no_credit_of_its_own_and_closes_no_other() -> None:
    with consuming({"embed": 3}) as worker:
        worker.connect()
        worker.cancel(PLAIN)
        worker.add("gw.control")
        worker.sees(embed=3, plain=1)
        worker.sees(waiting={"embed": 50})
        assert worker.prefetch == 3
        assert worker.opened == (EMBED, "gw.control")
        worker.sees(embed=0, plain=0)
        assert worker.closed == (EMBED, "gw.control")


def test_tasks_with_an_eta_keep_what_celery_added_for_them(worker: Consuming) -> None:
    worker.sees(**ALL)
    worker.consumer.qos.increment_eventually(10)
    worker.sees(embed=4)
    assert worker.prefetch == 16
    worker.sees(embed=0, classify=0)
    assert worker.prefetch == 11


def test_the_broker_is_told_of_another_prefetch_count_at_once_and_of_the_same_not(
    worker: Consuming, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Celery's loop does it, too, once it has waited for the next message or timer.
    told: list[int] = []
    monkeypatch.setattr(
        worker.channel, "qos", lambda prefetch_count, apply_global: told.append(prefetch_count)
    )
    worker.sees(**ALL)
    assert told == [4]
    worker.sees()
    assert told == [4]


def test_a_project_that_wants_no_prefetch_limit_keeps_none() -> None:
    with consuming() as worker:
        worker.connect(multiplier=0)
        worker.sees(**ALL)
        assert worker.prefetch == 0
        assert worker.consumed == {EMBED, CLASSIFY, PLAIN}


def test_each_connection_starts_from_its_own_prefetch_count(worker: Consuming) -> None:
    worker.sees(**ALL)
    before = worker.consumer
    worker.disconnect()
    worker.connect(prefetch=7)
    assert worker.prefetch == 4
    worker.sees(embed=0)
    assert worker.prefetch == 2
    assert before.qos.value == 4


# -- a broker that counts for each queue, from when it is consumed (quorum queues) --


@pytest.fixture
def quorum() -> Iterator[Consuming]:
    """A worker of quorum queues, all of them open."""
    with consuming() as made:
        made.connect(is_quorum=True)
        made.sees(**ALL)
        yield made


def test_each_quorum_queue_is_consumed_with_the_slots_of_its_service(quorum: Consuming) -> None:
    assert quorum.channel.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}


def test_a_quorum_queue_is_consumed_anew_when_its_slots_change_and_no_other(
    quorum: Consuming,
) -> None:
    quorum.channel.began.clear()
    quorum.sees(embed=6)
    quorum.sees()
    assert quorum.channel.counts == {EMBED: 6, CLASSIFY: 1, PLAIN: 1}
    assert quorum.channel.began == [EMBED]


def test_a_quorum_queue_needs_no_closing_when_its_service_is_full(quorum: Consuming) -> None:
    quorum.sees(waiting={"embed": 5})
    assert quorum.channel.counts[EMBED] == 2


def test_a_quorum_queue_without_a_replica_is_closed_and_opens_again(quorum: Consuming) -> None:
    quorum.sees(embed=0)
    assert quorum.channel.counts == {CLASSIFY: 1, PLAIN: 1}
    quorum.sees(embed=2)
    assert quorum.channel.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}


def test_the_next_connection_has_the_counts_of_quorum_queues_too(quorum: Consuming) -> None:
    quorum.disconnect()
    quorum.connect(is_quorum=True)
    assert quorum.channel.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}
    assert len(quorum.channel.began) == 3, "the first takes no other along with its count"


# -- a broker that prefers some consumers to others (RabbitMQ) --


@pytest.fixture
def open_worker(worker: Consuming) -> Consuming:
    """A worker whose queues are all open."""
    worker.sees(**ALL)
    return worker


def test_a_queue_is_consumed_with_the_priority_of_its_service(open_worker: Consuming) -> None:
    arguments = open_worker.channel.arguments
    assert arguments == {EMBED: None, CLASSIFY: None, PLAIN: None}
    open_worker.sees(bands={"embed": "quick", "classify": "slow"})
    assert arguments == {EMBED: {"x-priority": 1}, CLASSIFY: {"x-priority": -1}, PLAIN: None}


def test_a_queue_is_consumed_anew_when_its_priority_changes_and_no_other(
    open_worker: Consuming,
) -> None:
    channel = open_worker.channel
    channel.began.clear()
    open_worker.sees(bands={"embed": "slow"})
    open_worker.sees()
    assert channel.began == [EMBED]
    open_worker.sees(bands={"embed": "middle"})
    assert channel.began == [EMBED, EMBED]
    assert channel.arguments[EMBED] is None


def test_a_queue_that_opens_again_has_its_priority(open_worker: Consuming) -> None:
    open_worker.sees(embed=0)
    open_worker.channel.began.clear()
    open_worker.sees(embed=2, bands={"embed": "quick"})
    assert open_worker.channel.began == [EMBED]
    assert open_worker.channel.arguments[EMBED] == {"x-priority": 1}


def test_a_message_that_comes_before_celerys_loop_runs_reaches_its_strategy(
    open_worker: Consuming, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ delivers from the first queue while the gate consumes the next one."""
    heard: list[Any] = []
    consume = Channel.consume

    def delivering(channel: Channel) -> None:
        consume(channel)
        open_worker.consumer.strategies["proj.embed"] = lambda message, *_: heard.append(message)
        sent = {"delivery_tag": "7", "delivery_info": {}}
        headers = {"task": "proj.embed", "id": "id-1"}
        channel._receive_callback({"body": "[]", "headers": headers, "properties": sent})

    open_worker.sees(bands={"embed": "quick"})
    open_worker.disconnect()
    monkeypatch.setattr(Channel, "consume", delivering)
    open_worker.connect()
    assert [message.headers["id"] for message in heard[:1]] == ["id-1"]


def test_the_next_connection_has_the_priorities_too(open_worker: Consuming) -> None:
    open_worker.sees(bands={"embed": "quick"})
    open_worker.disconnect()
    open_worker.connect()
    assert open_worker.channel.arguments[EMBED] == {"x-priority": 1}
    assert PLAIN in open_worker.consumed


def test_a_queue_that_add_consumer_opens_has_its_priority(open_worker: Consuming) -> None:
    open_worker.cancel(EMBED)
    open_worker.sees(bands={"embed": "quick"})
    open_worker.add(EMBED)
    assert open_worker.channel.arguments[EMBED] == {"x-priority": 1}


def test_what_the_user_says_of_a_consumer_is_kept(open_worker: Consuming) -> None:
    queues, channel = open_worker.queues, open_worker.channel
    queues[EMBED].consumer_arguments = {"x-cancel-on-ha-failover": True}
    queues[CLASSIFY].consumer_arguments = {"x-priority": 7}
    channel.began.clear()
    open_worker.sees(bands={"embed": "quick", "classify": "quick"})
    assert channel.began == [EMBED]
    assert channel.arguments[EMBED] == {"x-cancel-on-ha-failover": True, "x-priority": 1}
    assert queues[EMBED].consumer_arguments == {"x-cancel-on-ha-failover": True}


def test_a_quorum_queue_is_consumed_anew_with_its_count_and_its_priority(
    quorum: Consuming,
) -> None:
    quorum.channel.began.clear()
    quorum.sees(bands={"embed": "slow"})
    quorum.sees()
    assert quorum.channel.began == [EMBED]
    assert quorum.channel.counts == {EMBED: 2, CLASSIFY: 1, PLAIN: 1}
    assert quorum.channel.arguments[EMBED] == {"x-priority": -1}
