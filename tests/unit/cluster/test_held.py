"""What operators see of the messages that workers hold, and give back, on a real Redis."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

import pytest
import redis
from celery import Celery

from gw_celery.cluster import held
from gw_celery.testing import Server
from tests.cluster_harness import Project, hold, leave_record

TTL = 15


@pytest.fixture
def client(gw_broker: Server) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(gw_broker.socket)) as client:
        yield client


@pytest.fixture
def project(gw_broker: Server, client: redis.Redis) -> Iterator[Project]:
    urls = {"broker": gw_broker.broker_url, "backend": gw_broker.result_url}
    with (
        Celery("cluster", set_as_current=False, **urls) as app,
        Project(app, client).running() as project,
    ):
        for name in ("a@h", "b@h"):
            project.add(name)
        project.after(2)
        yield project


@pytest.fixture
def holders(project: Project, monkeypatch: pytest.MonkeyPatch) -> held.Holders:
    """While it sleeps, the others live on."""

    def sleep(seconds: float) -> None:
        project.after(int(seconds))

    holders = held.holders(project.app, TTL)
    assert holders is not None
    monkeypatch.setattr(held, "time", types.SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(
        redis.Redis, "time", lambda client: (int(client.get("test:now").split(b".")[0]), 0)
    )
    return holders


def take(project: Project, incarnation: str, *ids: str) -> None:
    for task_id in ids:
        project.app.send_task("unit.task", task_id=task_id)
    hold(project.client, incarnation, len(ids))


def test_it_lists_what_each_worker_holds(project: Project, holders: held.Holders) -> None:
    one, two = (project.workers[name].incarnation for name in ("a@h", "b@h"))
    take(project, one, "x", "y")
    take(project, two, "z")
    take(project, "gone@h:1.0", "v")
    project.client.set("gw:dead:gone@h:1.0", one)
    project.after(4, frozen=["b@h"])
    listed = {entry.incarnation: entry for entry in holders.listed()}
    assert {name: entry.messages for name, entry in listed.items()} == {
        one: 2,
        two: 1,
        "gone@h:1.0": 1,
    }
    assert [listed[name].silent for name in (one, two, "gone@h:1.0")] == [0.0, 4.0, None]
    assert [listed[name].is_lost for name in (one, two, "gone@h:1.0")] == [False, False, True]


def test_it_gives_back_for_lost_workers_alone(
    project: Project, holders: held.Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        project.after(int(seconds))
        project.client.zadd("gw:alive", {"lives@h:1.0": 1e9 + project.now})

    monkeypatch.setattr(held, "time", types.SimpleNamespace(sleep=sleep))
    take(project, "lives@h:1.0", "lives")
    project.workers.pop("a@h").leave()  # only stock workers are left
    killed = project.workers.pop("b@h")
    take(project, killed.incarnation, "x", "y")
    leave_record(project.app, killed.start, 1, "early")
    take(project, "flushed@h:1.0", "z")  # Redis has lost its heartbeat
    take(project, "declared@h:1.0", "w")
    project.client.set("gw:dead:declared@h:1.0", "another@h:1.0")  # which died as it had said so
    assert holders.reclaim() == {killed.incarnation: 2, "flushed@h:1.0": 1, "declared@h:1.0": 1}
    assert project.client.llen("celery") == 4
    assert not project.client.exists("gw:dead:lives@h:1.0")
    assert project.app.backend.get_state("early") == "FAILURE"
    assert killed.incarnation not in project.alive()
    assert [entry.messages for entry in holders.listed()] == [1]


def test_it_takes_no_running_input_from_a_worker_that_goes_on_as_another(
    project: Project, holders: held.Holders
) -> None:
    woken = project.workers["b@h"]
    before = woken.incarnation
    take(project, before, "x")
    project.client.set(f"gw:dead:{before}", "another@h:1.0")  # which died as it had said so
    project.after(2)
    project.client.zrem("gw:alive", before)
    leave_record(project.app, woken.start, 1, "running")
    assert holders.reclaim() == {before: 1}
    assert project.client.llen("celery") == 1
    assert project.app.backend.get_state("running") == "PENDING"


def outage(project: Project) -> None:
    project.after(6, frozen=["a@h", "b@h"])


def jump(project: Project) -> None:
    project.shift += 3600.0


@pytest.mark.parametrize("trouble", [outage, jump])
def test_it_takes_nothing_from_workers_that_could_not_beat_meanwhile(
    project: Project,
    holders: held.Holders,
    trouble: Callable[[Project], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = project.workers["a@h"]
    take(project, one.incarnation, "x")
    seconds: list[float] = []

    def sleep(period: float) -> None:
        seconds.append(period)
        if len(seconds) == TTL - 1:
            trouble(project)
            project.after(1, frozen=["a@h"])
        else:
            # It hangs for longer than the others, as it connects again.
            project.after(1, frozen=["a@h"] if TTL - 1 < len(seconds) < TTL + 8 else [])

    monkeypatch.setattr(held, "time", types.SimpleNamespace(sleep=sleep))
    assert holders.reclaim() == {}
    assert len(seconds) > 2 * TTL - 3
    assert project.tombstones() == set()


def test_a_worker_that_comes_while_it_looks_keeps_what_it_takes(
    project: Project, holders: held.Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = holders.listed

    def list_late() -> list[held.Held]:
        late = project.add("late@h")
        late.run_round()
        take(project, late.incarnation, "x")
        return listed()

    monkeypatch.setattr(holders, "listed", list_late)
    assert holders.reclaim() == {}
    assert project.tombstones() == set()


def test_there_is_none_without_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    with Celery(broker="memory://", set_as_current=False) as app:
        assert held.holders(app, TTL) is None
