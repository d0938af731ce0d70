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
from gw_celery.pool import jobs, places, supervisor, wire

LIVES = gw.Probe.on("lives", kind="liveness", period_s=10)


class Process:
    """Stands in for a child's process, and keeps its end of the socket."""

    pid = 100

    def __init__(self, command: Any, pass_fds: list[int], **_: Any) -> None:
        self.socket = socket.socket(fileno=os.dup(pass_fds[0]))
        self.socket.setblocking(False)
        self._unpacker = wire.Unpacker(wire.MAX_PARENT_FRAME_BYTES)

    def poll(self) -> None:
        """It runs."""

    def kill(self) -> None:
        self.socket.close()

    def wait(self, timeout: float) -> int:
        return -9

    def report(self, *reports: list[Any]) -> None:
        self.socket.send(wire.pack_reports(reports))

    def orders(self) -> list[tuple[Any, ...]]:
        """What it was told since the last call."""
        try:
            frames = self._unpacker.feed(self.socket.recv(1 << 20))
        except BlockingIOError:
            return []
        return [order for frame in frames for order in wire.unpack_orders(frame)]


class Site:
    """A worker's only replica, READY, on a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        started: list[Process] = []

        def popen(*args: Any, **given: Any) -> Process:
            started.append(Process(*args, **given))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", popen)
        monkeypatch.setattr(jobs, "now", lambda: self.now)
        setup = places.Setup(
            settings=conf.Settings(),
            slots={"proj.Model": 2, "": 1},
            first={},
            probes=[("proj.Model", LIVES)],
        )
        self.supervisor = supervisor.Supervisor(setup, lambda: None)
        self.supervisor.resize(1)
        self.supervisor.tick()
        (self.process,) = started
        self.process.report([wire.Report.LOADED], [wire.Report.ENTERED])
        self.supervisor.poll(10.0)
        assert self.supervisor.ready_by_service() == {"proj.Model": 2, "": 1}
        self.process.orders()


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
    assert site.process.orders() == [(wire.Order.PROBE, 1, "proj.Model", "lives")]
    site.supervisor.probe_tick()
    assert site.process.orders() == [], "its answer is awaited"
