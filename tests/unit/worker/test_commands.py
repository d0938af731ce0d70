from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.control import Panel

from gw_celery.protocol import snapshot
from gw_celery.protocol.snapshot import Worker
from gw_celery.worker import commands

TALLY = snapshot.Counters(arrived=3.0, waiting=3.0, arrived_inputs=1, waiting_inputs=1)
SCALING = snapshot.Scaling(least=1, most=4, services={"embed": snapshot.ServiceDemand(queued=7)})
NAMES = (
    "gw_status",
    "gw_drain",
    "gw_restart",
    "gw_probe_tick",
    "gw_benchmark_tick",
    "gw_best_score",
)


class Pool:
    """A pool with replicas 0 and 2, which notes what it is told."""

    def __init__(self) -> None:
        self.numbers: tuple[int, ...] = (0, 2)
        self.told: list[tuple[str, int | None]] = []

    def snapshot(self) -> Worker:
        replicas = [
            snapshot.Replica(number=number, state="ready", pid=100 + number)
            for number in self.numbers
        ]
        return Worker(
            hostname="gpu@host",
            replicas=tuple(replicas),
            ready_slots={"embed": 8, "": 2},
            waiting=5,
            tallies={"embed": TALLY},
            open_queues=("cpu.embed",),
            closed_queues=("cpu.classify",),
            outage="gone",
            scaling=SCALING,
            scores={"embed": snapshot.Score(value=9.0)},
        )

    def hold(self, number: int | None) -> None:
        self.told.append(("drain", number))

    def restart(self, number: int | None) -> None:
        self.told.append(("restart", number))

    def probe_tick(self) -> None:
        self.told.append(("probe", None))

    def benchmark_tick(self) -> None:
        self.told.append(("benchmark", None))


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def state(pool: Pool) -> Any:
    """What Celery gives to every remote-control command."""
    return SimpleNamespace(consumer=SimpleNamespace(pool=pool), hostname="gpu@host")


def test_the_status_is_the_snapshot_of_the_pool_and_travels_as_json(state: Any) -> None:
    status = json.loads(json.dumps(commands.gw_status(state)))
    assert [(seen["number"], seen["pid"]) for seen in status.pop("replicas")] == [
        (0, 100),
        (2, 102),
    ]
    assert status == {
        "hostname": "gpu@host",
        "desired": 0,
        "desired_slots": 0,
        "waiting_inputs": {},
        "is_stopping": False,
        "ready_slots": {"embed": 8, "": 2},
        "waiting": 5,
        "tallies": {"embed": dataclasses.asdict(TALLY)},
        "open_queues": ["cpu.embed"],
        "closed_queues": ["cpu.classify"],
        "bands": {},
        "outage": "gone",
        "scaling": dataclasses.asdict(SCALING),
        "scores": {"embed": dataclasses.asdict(snapshot.Score(value=9.0)) | {"benchmarks": []}},
    }


@pytest.mark.parametrize("what", ["drain", "restart"])
@pytest.mark.parametrize("replica", [0, 2])
def test_one_replica_is_steered(state: Any, pool: Pool, what: str, replica: int) -> None:
    answer = getattr(commands, f"gw_{what}")(state, replica)
    assert answer == {"ok": f"{what}: replica {replica}"}
    assert pool.told == [(what, replica)]


@pytest.mark.parametrize("what", ["drain", "restart"])
def test_without_a_number_all_replicas_are_steered(state: Any, pool: Pool, what: str) -> None:
    answer = getattr(commands, f"gw_{what}")(state)
    assert answer == {"ok": f"{what}: all replicas"}
    assert pool.told == [(what, None)]


@pytest.mark.parametrize("what", ["drain", "restart"])
@pytest.mark.parametrize("replica", [1, -1, "0"])
def test_a_replica_that_is_not_there_is_refused_with_those_that_are(
    state: Any, pool: Pool, what: str, replica: Any
) -> None:
    answer = getattr(commands, f"gw_{what}")(state, replica)
    assert answer == {"error": f"there is no replica {replica!r}: this worker has replicas 0, 2"}
    assert pool.told == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((), "none"),
        ((0,), "replica 0"),
        ((0, 1, 2, 3), "replicas 0 to 3"),
        ((0, 2, 3), "replicas 0, 2, 3"),
    ],
)
def test_the_replicas_that_are_there_are_not_taken_for_their_count(
    state: Any, pool: Pool, numbers: tuple[int, ...], said: str
) -> None:
    pool.numbers = numbers
    answer = commands.gw_restart(state, 7)
    assert answer == {"error": f"there is no replica 7: this worker has {said}"}


@pytest.fixture
def installed() -> Iterator[None]:
    """The commands are among Celery's, whose registry is the process's, for one test."""
    before = {name: (Panel.data.get(name), Panel.meta.get(name)) for name in NAMES}
    commands.install()
    yield
    for name, (command, about) in before.items():
        for registry, value in ((Panel.data, command), (Panel.meta, about)):
            registry.pop(name)
            if value is not None:
                registry[name] = value


def test_the_command_line_knows_commands_that_a_process_does_not_carry_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("data", "meta"):
        monkeypatch.setattr(Panel, name, {})
    commands.describe()
    assert (sorted(Panel.meta), Panel.data) == (sorted(NAMES), {})

    commands.install()
    commands.describe()
    assert sorted(Panel.data) == sorted(NAMES), "a worker with the GPU pool keeps them"


@pytest.mark.usefixtures("installed")
def test_celery_knows_the_commands_and_can_list_them() -> None:
    assert [Panel.data[name] for name in NAMES] == [getattr(commands, name) for name in NAMES]
    assert [Panel.meta[name].type for name in NAMES] == ["inspect", *["control"] * 5]
    for name in NAMES:
        assert Panel.meta[name].help == inspect.getdoc(getattr(commands, name))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["gw_drain", "gw_restart"])
def test_celerys_own_command_line_can_name_a_replica(name: str) -> None:
    about = Panel.meta[name]
    assert (about.args, about.signature, about.variadic) == ([("replica", int)], "[replica]", None)


@pytest.mark.parametrize("what", ["probe", "benchmark"])
def test_a_tick_reaches_the_gpu_pool_and_means_nothing_elsewhere(
    state: Any, pool: Pool, what: str
) -> None:
    command = getattr(commands, f"gw_{what}_tick")
    assert command(state) == {"ok": "tick"}
    assert pool.told == [(what, None)]
    state.consumer.pool = object()
    assert command(state) == {"ok": "nothing to do: no GPU pool"}


def test_what_an_older_worker_tells_is_heard_without_complaint(state: Any) -> None:
    commands.gw_best_score(state, worker="other@host", scores={"embed": 4.0})
    state.consumer.pool = object()
    commands.gw_best_score(state, worker="other@host", scores={"embed": 4.0})
