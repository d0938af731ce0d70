"""The control commands of a worker, carried out as Celery's mailbox does, on the real pool."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.control import Panel

from tests.pool_harness import Harness
from tests.processes import environment

NAMES = {
    "gw_status",
    "gw_drain",
    "gw_restart",
    "gw_probe_tick",
    "gw_benchmark_tick",
    "gw_best_score",
}


@contextmanager
def running(replicas: int = 3) -> Iterator[Harness]:
    with Harness(replicas=replicas).running() as harness:
        for child in harness.children:
            child.ready()
        yield harness


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A worker with the replicas 0, 1 and 2."""
    with running() as started:
        yield started


def tell(pool: Any, command: str, scaler: Any = None, **arguments: Any) -> Any:
    """The answer of a worker with this pool to a command, after it has travelled."""
    controller = SimpleNamespace(autoscaler=scaler)
    consumer = SimpleNamespace(
        pool=pool, controller=controller, _update_prefetch_count=lambda slots: None
    )
    state = SimpleNamespace(consumer=consumer, hostname="harness@test")
    return json.loads(json.dumps(Panel.data[command](state, **arguments)))


def test_the_status_shows_replicas_queues_and_inputs(harness: Harness) -> None:
    request = harness.submit()
    harness.child_of(request).accept(request)
    status = tell(harness.pool, "gw_status")
    assert [(seen["number"], seen["state"], seen["pid"]) for seen in status["replicas"]] == [
        (number, "ready", harness.child(number).pid) for number in range(3)
    ]
    assert (status["hostname"], status["desired"], status["desired_slots"]) == (
        "harness@test",
        3,
        9,
    )
    assert sum(seen["in_flight"] for seen in status["replicas"]) == 1
    assert {"ready_slots", "tallies", "open_queues", "closed_queues", "scores"} <= set(status)
    assert (status["waiting"], status["outage"], status["scaling"]) == (0, "", None)


@pytest.mark.parametrize("replica", [0, 2])
def test_one_replica_is_drained_and_comes_back_with_a_restart(
    harness: Harness, replica: int
) -> None:
    assert tell(harness.pool, "gw_drain", replica=replica) == {"ok": f"drain: replica {replica}"}
    harness.poll()
    assert [child.number for child in harness.children if child.is_leaving] == [replica]
    harness.child(replica).die(code=0)
    assert harness.replica(replica)["state"] == "stopped"
    assert tell(harness.pool, "gw_restart", replica=replica) == {
        "ok": f"restart: replica {replica}"
    }
    harness.advance(1.0)
    harness.child(replica).ready()
    assert harness.replica(replica)["state"] == "ready"


def test_without_a_number_all_replicas_are_steered(harness: Harness) -> None:
    assert tell(harness.pool, "gw_drain") == {"ok": "drain: all replicas"}
    harness.poll()
    assert [child.is_leaving for child in harness.children] == [True] * 3
    assert tell(harness.pool, "gw_restart") == {"ok": "restart: all replicas"}


@pytest.mark.parametrize("what", ["drain", "restart"])
@pytest.mark.parametrize("replica", [3, -1, "0"])
def test_a_replica_that_is_not_there_is_refused_with_those_that_are(
    harness: Harness, what: str, replica: Any
) -> None:
    answer = tell(harness.pool, f"gw_{what}", replica=replica)
    assert answer == {"error": f"there is no replica {replica!r}: this worker has replicas 0 to 2"}
    assert not any(child.is_draining for child in harness.children)


@pytest.mark.parametrize(
    ("replicas", "gone", "said"),
    [
        (1, [], "replica 0"),
        (1, [0], "none"),
        (4, [], "replicas 0 to 3"),
        (4, [1], "replicas 0, 2, 3"),
    ],
)
def test_the_replicas_that_are_there_are_not_taken_for_their_count(
    replicas: int, gone: list[int], said: str
) -> None:
    with running(replicas) as harness:
        busy = {number: harness.submit() for number in range(replicas)}
        for request in busy.values():
            child = harness.child_of(request)
            child.accept(request)
            if child.number in gone:
                child.done(request)
        harness.pool.shrink(3 * len(gone))
        harness.poll()
        for number in gone:
            harness.child(number).die(code=0)
        harness.advance(1.0)
        answer = tell(harness.pool, "gw_restart", replica=7)
        assert answer == {"error": f"there is no replica 7: this worker has {said}"}


@pytest.mark.parametrize("what", ["probe", "benchmark"])
def test_a_tick_reaches_the_gpu_pool_and_means_nothing_elsewhere(
    harness: Harness, what: str
) -> None:
    assert tell(harness.pool, f"gw_{what}_tick") == {"ok": "tick"}
    assert set(harness.info()["gw_tick_ages"]) == {what}
    assert tell(object(), f"gw_{what}_tick") == {"ok": "nothing to do: no GPU pool"}


@pytest.mark.usefixtures("harness")
def test_what_an_older_worker_tells_is_heard_without_complaint() -> None:
    for pool in (object(), None):
        scores = {"embed": 4.0}
        assert tell(pool, "gw_best_score", worker="other@host", scores=scores) is None


@pytest.mark.usefixtures("harness")
def test_celery_knows_the_commands_and_can_list_them() -> None:
    assert set(Panel.data) >= NAMES
    kinds = {name: Panel.meta[name].type for name in NAMES}
    assert kinds == dict.fromkeys(NAMES, "control") | {"gw_status": "inspect"}
    assert all(Panel.meta[name].help for name in NAMES)
    for name in ("gw_drain", "gw_restart"):
        about = Panel.meta[name]
        assert (about.args, about.signature) == ([("replica", int)], "[replica]")


def test_the_command_line_knows_commands_that_a_process_does_not_carry_out() -> None:
    """A worker without the GPU pool is started by the same program."""
    code = (
        "import click; from celery.bin.celery import celery; from celery.worker.control import *\n"
        "celery.get_command(click.Context(celery), 'gw')\n"
        "print(*(name for name in Panel.meta if name.startswith('gw_')))\n"
        "print(*(name for name in Panel.data if name.startswith('gw_')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    known, carried_out = done.stdout.splitlines()
    assert (set(known.split()), carried_out) == (NAMES, "")


class Scaler:
    """An autoscaler that an operator can have the pool resized by, as ours."""

    def __init__(self, pool: Any) -> None:
        self.force_scale_up: Callable[[int], None] = pool.grow
        self.force_scale_down: Callable[[int], None] = pool.shrink


@pytest.mark.parametrize(("command", "slots"), [("pool_grow", 12), ("pool_shrink", 6)])
def test_our_autoscaler_lets_an_operator_resize_the_pool(
    harness: Harness, command: str, slots: int
) -> None:
    pool, scaler = harness.pool, Scaler(harness.pool)
    assert tell(pool, command, scaler, n=3) == {"ok": f"now {slots} slots"}
    assert tell(pool, command, scaler, n=-3) == {"error": "n=-3: must be an int, 1 at least"}
    assert "not supported with autoscale" in tell(pool, command, object(), n=1)["error"]
    assert pool.num_processes == slots


def test_without_an_autoscaler_celerys_own_commands_resize_the_pool(harness: Harness) -> None:
    assert "ok" in tell(harness.pool, "pool_grow", n=3)
    assert harness.pool.num_processes == 12


@pytest.mark.parametrize("command", ["pool_grow", "pool_shrink"])
@pytest.mark.parametrize("slots", [0, 1.0, True, "1", None, [1], {"n": 1}])
def test_a_size_that_is_no_number_of_slots_is_refused(
    harness: Harness, command: str, slots: Any
) -> None:
    for scaler in (None, Scaler(harness.pool)):
        answer = tell(harness.pool, command, scaler, n=slots)
        assert answer == {"error": f"n={slots!r}: must be an int, 1 at least"}
    assert harness.pool.num_processes == 9


@pytest.mark.parametrize("slots", [1024 * 3, 1_000_000_000, 10**4000])
def test_a_worker_without_gpus_has_a_bound_too(harness: Harness, slots: int) -> None:
    for scaler in (None, Scaler(harness.pool)):
        for command, arguments in (("pool_grow", {"n": slots}), ("autoscale", {"max": slots + 3})):
            error = tell(harness.pool, command, scaler, **arguments)["error"]
            assert "replicas were asked for" in error or len(error) == 1000
            assert "1024 at most" in error or len(error) == 1000
    harness.pool.grow(slots)  # an autoscaler of the project may ask for it
    assert harness.pool.num_processes == 1024 * 3
    harness.pool.shrink(1023 * 3)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("autoscale", {"max": "2"}),
        ("autoscale", {"max": 2.0, "min": 1}),
        ("autoscale", {"max": 2, "min": True}),
        ("autoscale", {"max": 2, "min": -1}),
        ("cancel_consumer", {"queue": {"a": 1}}),
        ("cancel_consumer", {"queue": ["a"]}),
        ("cancel_consumer", {"queue": ""}),
        ("cancel_consumer", {"queue": None}),
        ("add_consumer", {"queue": 7}),
        ("add_consumer", {"queue": "x" * 256}),
        ("add_consumer", {"queue": "\u00e9" * 128}),
        ("add_consumer", {"queue": "q", "exchange": {}}),
        ("add_consumer", {"queue": "q", "routing_key": 1}),
        ("add_consumer", {"queue": "q", "consumer_arguments": 5}),
        ("add_consumer", {"queue": "q", "durable": "no"}),
        ("add_consumer", {"queue": "q", "max_priority": -1}),
        ("add_consumer", {"queue": "q", "bindings": ["x"]}),
        ("rate_limit", {"task_name": ["plain"], "rate_limit": 1}),
        ("rate_limit", {"task_name": "plain", "rate_limit": "inf/s"}),
        ("rate_limit", {"task_name": "plain", "rate_limit": "nan"}),
        ("rate_limit", {"task_name": "plain", "rate_limit": "-1/m"}),
        ("rate_limit", {"task_name": "plain", "rate_limit": "1/year"}),
        ("rate_limit", {"task_name": "plain", "rate_limit": -2}),
        ("rate_limit", {"task_name": "plain", "rate_limit": True}),
        ("rate_limit", {"task_name": "plain", "rate_limit": {"a": 1}}),
        ("time_limit", {"task_name": "plain", "soft": "5"}),
        ("time_limit", {"task_name": "plain", "hard": -1}),
        ("time_limit", {"task_name": "plain", "hard": float("inf")}),
        ("time_limit", {"task_name": {}, "hard": 1}),
        ("revoke", {"task_id": {"a": 1}}),
        ("revoke", {"task_id": ["a", 1]}),
        ("revoke", {"task_id": "a", "terminate": "yes"}),
        ("revoke", {"task_id": "a", "terminate": True, "signal": "NOTHING"}),
        ("revoke", {"task_id": "a", "terminate": True, "signal": 1000}),
        ("terminate", {"task_id": "a", "signal": []}),
        ("revoke_by_stamped_headers", {"headers": {"a": [{}]}}),
        ("revoke_by_stamped_headers", {"headers": ["a"]}),
        ("query_task", {"ids": 5}),
        ("pool_restart", {"modules": "os"}),
        ("shutdown", {"msg": {}}),
        ("hello", {"from_node": "w", "revoked": {"a": float("nan")}}),
        ("hello", {"from_node": "w", "revoked": [[]]}),
        ("gw_drain", {"replica": 0, "all": True}),
        ("gw_restart", {"replica": True}),
        ("gw_drain", {"replica": 0.0}),
    ],
)
def test_arguments_of_a_wrong_type_or_range_are_refused_before_the_command_runs(
    harness: Harness, command: str, arguments: dict[str, Any]
) -> None:
    controller = SimpleNamespace(autoscaler=Scaler(harness.pool))
    # It has nothing that a command could reach but the pool.
    consumer = SimpleNamespace(pool=harness.pool, controller=controller)
    state = SimpleNamespace(consumer=consumer, hostname="harness@test", app=harness.app)
    answer = Panel.data[command](state, **arguments)
    assert list(answer) == ["error"]
    assert any(reason in answer["error"] for reason in ("must be", "unknown", "there is no"))
    assert not any(child.is_draining for child in harness.children)


def test_a_command_of_the_project_gets_what_was_sent(harness: Harness) -> None:
    del harness
    Panel.data["own"] = lambda state, n, **others: (n, others)
    assert Panel.data["own"](None, n="many", queue={}) == ("many", {"queue": {}})
