from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gw_celery.policy import demand, scaling
from gw_celery.protocol import snapshot
from gw_celery.protocol.worker_record import ServiceRecord, Size, WorkerRecord

RULES = scaling.Rules(target_queue_time=10.0, target_util=1.0, start_up=10.0)
SIZE = {field.name for field in dataclasses.fields(Size)}


def record(name: str = "gpu@me", *services: str, **given: Any) -> WorkerRecord:
    """A worker of four replicas that do 2 a second; ``services`` beside the model."""
    size = Size(**({"capacity": 4} | {key: given.pop(key) for key in SIZE & given.keys()}))
    incarnation = given.pop("incarnation", name)
    model = ServiceRecord(**({"score": 2.0} | given))
    others = dict.fromkeys(services, ServiceRecord())
    return WorkerRecord(
        worker=name, incarnation=incarnation, size=size, services={"model": model, **others}
    )


ME = record()


def seen(
    *looks: dict[str, Any], mine: WorkerRecord = ME, others: Any = None, slots: int = 2
) -> list[snapshot.ServiceDemand]:
    """The demands of one service, a second apart; each may say ``mine`` and ``others`` itself."""
    service = demand.Service("model", slots, RULES, 0.0)
    return [
        service.observe(float(now), look.pop("mine", mine), look.pop("others", others), **look)
        for now, look in enumerate(looks, start=1)
    ]


def test_what_waits_in_the_queue_and_in_the_worker_is_to_be_done_in_time() -> None:
    mine = record(waiting=20.0, waiting_inputs=2, mean=10.0)
    (one,) = seen({"queued": 8}, mine=mine)
    assert one.waiting == 100.0
    # 100 within 10 s, by replicas that do 2 a second each.
    assert one.need == pytest.approx(5.0)
    assert one.is_active


def test_what_waits_orders_no_more_replicas_than_it_fills() -> None:
    mine = record(score=0.001)
    (one,) = seen({"queued": 6}, mine=mine)
    assert one.need == pytest.approx(3.0)


def test_a_queue_that_was_full_before_anybody_looked_is_no_rate() -> None:
    first, second = seen({"queued": 1000}, {"queued": 1000})
    assert (first.rate, second.rate) == (0.0, 0.0)


def test_what_moves_from_the_queue_to_a_worker_has_not_come_twice() -> None:
    took = record(taken=5.0, waiting=0.0, running_inputs=5)
    before, after = seen({"queued": 5}, {"queued": 0, "mine": took})
    assert after.rate == before.rate == 0.0
    assert after.is_active


def test_what_comes_is_what_the_queue_and_the_workers_have_more_of() -> None:
    looks = [{"queued": second, "mine": record(taken=3.0 * second)} for second in range(60)]
    assert seen(*looks)[-1].rate == pytest.approx(4.0)


def test_another_life_of_a_worker_has_taken_nothing_yet() -> None:
    before = record(taken=500.0, incarnation="a")
    after = record(taken=3.0, incarnation="b")
    assert seen({"queued": 0, "mine": before}, {"queued": 0, "mine": after})[-1].rate == 0.0


def test_a_worker_that_is_gone_takes_nothing_back() -> None:
    two = record("gpu@two", taken=500.0)
    assert seen({"queued": 0, "others": [two]}, {"queued": 0, "others": []})[-1].rate == 0.0


def test_without_a_score_as_many_as_hold_all_inputs_are_needed() -> None:
    mine = record(score=None, running_inputs=2, waiting_inputs=1)
    (one,) = seen({"queued": 4}, mine=mine)
    assert (one.need, one.keep) == (3.5, 3.5)


def test_a_transport_that_tells_nothing_leaves_what_the_worker_holds() -> None:
    mine = record(waiting=40.0, waiting_inputs=40)
    (one,) = seen({}, mine=mine)
    assert (one.queued, one.waiting, one.need) == (None, 40.0, 2.0)


def test_a_transport_that_tells_nothing_has_one_more_wanted_while_all_are_full() -> None:
    full = record(replicas=2, running_inputs=4)
    assert seen({}, mine=full)[0].need == 3.0
    assert seen({"queued": 0}, mine=full)[0].need == 0.0
    assert seen({}, mine=record(replicas=2, running_inputs=3))[0].need == 0.0


def test_workers_that_serve_the_same_see_the_same_need() -> None:
    two = record("gpu@two", waiting=10.0, waiting_inputs=10, capacity=1)
    (mine,) = seen({"queued": 50}, others=[two])
    (theirs,) = seen({"queued": 50}, mine=two, others=[ME])
    assert mine == theirs
    assert (mine.share, mine.waiting, mine.need) == (1.0, 60.0, 3.0)


def test_those_that_serve_other_things_too_have_their_part_by_capacity() -> None:
    two = record("gpu@two", "more", capacity=12)
    (mine,) = seen({"queued": 80}, others=[two])
    (theirs,) = seen({"queued": 80}, mine=two, others=[ME])
    assert (mine.share, theirs.share) == (0.25, 0.75)
    assert (mine.waiting, theirs.waiting) == (20.0, 60.0)


def test_a_worker_that_cannot_start_a_replica_leaves_the_work_to_others() -> None:
    (one,) = seen({"queued": 80}, others=[record("gpu@two", "more", capacity=0)])
    assert one.share == 1.0
    (none,) = seen(
        {"queued": 80},
        mine=record(capacity=0),
        others=[record("gpu@two", "more", capacity=0)],
    )
    assert none.share == 0.5


def test_where_only_consumers_are_counted_the_queue_is_divided_among_them() -> None:
    mine = record(waiting=10.0, waiting_inputs=10)
    (one,) = seen({"queued": 80, "consumers": 4}, mine=mine)
    assert (one.share, one.waiting) == (0.25, 30.0)
    (alone,) = seen({"queued": 80, "consumers": 0}, mine=mine)
    assert alone.waiting == 90.0


def test_the_score_of_a_service_is_that_of_its_workers_by_capacity() -> None:
    (one,) = seen(
        {"queued": 0}, others=[record("a", capacity=12, score=6.0), record("b", score=None)]
    )
    assert one.score == 5.0


def test_a_group_is_those_that_serve_the_same() -> None:
    two, three = record("gpu@two"), record("gpu@three", "more")
    elsewhere = record("gpu@four", queues="elsewhere")
    fixed = dataclasses.replace(record("gpu@five"), size=None)
    assert demand.group_of(ME, [two, three, elsewhere, fixed]) == [ME, two]
    assert demand.group_of(ME, None) == [ME]
    assert demand.sharing(ME, [two, three, elsewhere, fixed], "model") == [two, three]
    assert demand.sharing(ME, None, "model") is None


@pytest.mark.parametrize(
    ("states", "size"),
    [
        ("", Size(least=1, capacity=4, replicas=2)),
        ("rr", Size(least=1, capacity=4, replicas=2)),
        ("rdd", Size(least=1, capacity=4, replicas=3)),
        ("rf", Size(least=1, capacity=3, replicas=2)),
        ("sr", Size(least=1, capacity=3, replicas=2)),
        ("ss", Size(least=1, capacity=0, replicas=2)),
    ],
)
def test_what_fails_or_is_held_is_no_capacity(states: str, size: Size) -> None:
    names = {"r": "ready", "d": "draining", "f": "failed", "s": "stopped"}
    replicas = tuple(
        snapshot.Replica(number=number, state=names[state], restarts=1)
        for number, state in enumerate(states)
    )
    worker = snapshot.Worker(hostname="gpu@me", replicas=replicas, desired=2)
    assert demand.size_of(worker, least=1, most=4) == size


def parts(*group: WorkerRecord, total: int) -> dict[str, int]:
    """The part of each, by its own account: each is the first of its group."""
    return {
        mine.worker: demand.part([mine, *(other for other in group if other is not mine)], total)
        for mine in group
    }


@pytest.mark.parametrize("total", range(9))
def test_the_parts_are_the_whole(total: int) -> None:
    found = parts(ME, record("gpu@two"), total=total)
    assert sum(found.values()) == total
    assert abs(found["gpu@me"] - found["gpu@two"]) <= 1


def test_a_faster_worker_has_more_and_a_little_faster_is_as_fast() -> None:
    fast = record("gpu@fast", score=8.0)
    assert parts(ME, fast, total=5) == {"gpu@me": 1, "gpu@fast": 4}
    assert parts(ME, record("gpu@two", score=2.2), total=4) == {"gpu@me": 2, "gpu@two": 2}


def test_a_group_that_changes_is_worked_out_anew() -> None:
    both = record("gpu@two")
    assert demand.part([ME, both], 8) == 4
    for number in [*range(10), 3, 0]:
        changed = record("gpu@two", capacity=number)
        assert demand.part([ME, changed], 4 + number) == 4
        assert demand.part([changed, ME], 4 + number) == number
    assert demand.part([ME, both], 8) == 4


# -- how long a start-up takes --


def replica(state: str, start_up: float | None = None, pid: int | None = 7) -> snapshot.Replica:
    return snapshot.Replica(number=0, state=state, pid=pid, start_up=start_up)


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        pytest.param([[], [replica("ready", 0.4)]], 0.4, id="READY at the next look"),
        pytest.param([[replica("starting")], [replica("failed", pid=None)]], None, id="failed"),
        pytest.param([[replica("ready", 9.0)]] * 3, 9.0, id="each child counts once"),
        pytest.param(
            [[replica("ready", seconds, pid)] for pid, seconds in enumerate([2.0, 4.0, 8.0])],
            5.5,
            id="the newest counts most",
        ),
        pytest.param(
            [[replica("ready", 60.0)], [replica("ready", 60.0), replica("ready", 50.0, pid=8)]],
            55.0,
            id="a child beside another",
        ),
    ],
)
def test_the_duration_of_a_start_up(
    looks: list[list[snapshot.Replica]], seconds: float | None
) -> None:
    start_up = demand.StartUp()
    for replicas in looks:
        start_up.observe(replicas)
    assert start_up.seconds == seconds


@pytest.mark.parametrize(
    ("replicas", "is_loading"),
    [
        ([replica("starting")], True),
        ([replica("entering")], True),
        ([replica("probing")], True),
        ([replica("benchmarking")], True),
        ([replica("ready", 60.0)], False),
        # It is measured again.
        ([replica("benchmarking", 60.0)], False),
        ([replica("unready", 60.0)], False),
        ([replica("draining", 60.0)], False),
        ([replica("ready", 60.0), replica("starting", pid=8)], True),
        ([replica("failed", pid=None)], False),
        ([], False),
    ],
)
def test_a_child_that_was_not_ready_yet_is_loading(
    replicas: list[snapshot.Replica], is_loading: bool
) -> None:
    start_up = demand.StartUp()
    start_up.observe([replica("starting")])
    start_up.observe(replicas)
    assert start_up.is_loading is is_loading
