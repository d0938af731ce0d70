"""A supervisor with a child that is written by hand, behind a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import gw_celery as gw
from gw_celery import conf
from gw_celery.pool import replica, supervisor
from gw_celery.pool import request as pool_request
from gw_celery.protocol import frames as protocol_frames
from tests.unit.pool import handmade

LIVES = gw.Probe.on("lives", kind="liveness", period_s=10)


class Process:
    """Stands in for a child's process, and keeps its end of the socket."""

    pid = 100
    is_killed = False

    def __init__(self, command: Any, pass_fds: list[int], **_: Any) -> None:
        self.socket = socket.socket(fileno=os.dup(pass_fds[0]))
        self.socket.setblocking(False)
        self._unpacker = protocol_frames.Unpacker(protocol_frames.MAX_PARENT_FRAME_BYTES)

    def poll(self) -> None:
        """It runs."""

    def kill(self) -> None:
        self.is_killed = True
        self.socket.close()

    def wait(self, timeout: float) -> int:
        return -9

    def report(self, *reports: list[Any]) -> None:
        self.socket.send(protocol_frames.pack_reports(reports))

    def orders(self) -> list[tuple[Any, ...]]:
        """What it was told since the last call."""
        try:
            frames = self._unpacker.feed(self.socket.recv(1 << 20))
        except BlockingIOError:
            return []
        return [order for frame in frames for order in protocol_frames.unpack_orders(frame)]


class Site:
    """A worker's only replica, READY, on a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        started: list[Process] = []

        def popen(*args: Any, **given: Any) -> Process:
            started.append(Process(*args, **given))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", popen)
        monkeypatch.setattr(pool_request, "now", lambda: self.now)
        setup = replica.Setup(
            settings=conf.Settings(),
            slots={"proj.Model": 2, "": 1},
            first={},
            probes=[("proj.Model", LIVES)],
        )
        self.supervisor = supervisor.Supervisor(setup, lambda: None)
        self.supervisor.resize(1)
        self.supervisor.tick()
        (self.process,) = started
        self.process.report([protocol_frames.Report.LOADED], [protocol_frames.Report.ENTERED])
        self.supervisor.poll(10.0)
        assert self.supervisor.snapshot("gpu@host").ready_slots == {"proj.Model": 2, "": 1}
        self.process.orders()

    def submit(self, task_id: str, **options: Any) -> pool_request.Job:
        """Give it an input, as Celery does."""
        request = handmade.Request()
        args = ("proj.embed", task_id, {"id": task_id}, b"", "json", "utf-8")
        given = {**request.options(), "correlation_id": task_id, **options}
        return self.supervisor.submit(args, "proj.Model", given)

    def begin(self, job: pool_request.Job) -> None:
        self.report([protocol_frames.Report.ACCEPT, job.number, self.now])

    def report(self, *reports: list[Any]) -> None:
        self.process.report(*reports)
        self.supervisor.poll(10.0)

    def drain(self) -> None:
        self.supervisor.resize(0)
        self.process.orders()

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.report([protocol_frames.Report.BEAT, 0.0, 0])
        self.supervisor.tick()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(monkeypatch)
    yield site
    site.supervisor.kill("the test is over")
    site.supervisor.release()


def test_a_tick_has_a_probe_called_that_is_due_and_no_other(site: Site) -> None:
    site.supervisor.probe_tick()
    assert site.process.orders() == []
    due = site.supervisor.next_deadline()
    assert due is not None
    site.now += due
    site.supervisor.probe_tick()
    assert site.process.orders() == [(protocol_frames.Order.PROBE, 1, "proj.Model", "lives")]
    site.supervisor.probe_tick()
    assert site.process.orders() == [], "its answer is awaited"


def test_a_drain_waits_for_what_has_no_limit_and_then_for_the_rest_no_longer(site: Site) -> None:
    endless, unbegun = site.submit("endless"), site.submit("never begins")
    site.begin(endless)
    site.drain()
    site.later(1000.0)
    assert not site.process.is_killed
    site.report([protocol_frames.Report.DONE, endless.number, "text", 1.0])
    site.later(29.0)
    assert not site.process.is_killed
    site.later(2.0)
    assert site.process.is_killed
    assert site.supervisor.snapshot("gpu@host").waiting == 1, "what never began starts elsewhere"
    assert not unbegun.is_answered


def test_what_does_not_stop_keeps_no_draining_replica(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = site.submit("stuck")
    site.begin(stuck)
    site.drain()
    site.later(28.0)
    stuck.terminate(15)
    assert (protocol_frames.Order.STOP, stuck.number) in site.process.orders()
    site.later(3.0)
    assert not site.process.is_killed
    assert "no time limit" not in caplog.text, "it is being stopped"
    site.later(conf.Settings().cancel_timeout)
    site.supervisor.poll()
    assert site.process.is_killed
