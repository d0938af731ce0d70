"""Inputs of a pool whose children, Redis and Celery requests are written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from gw_celery import conf
from gw_celery.declare import services
from gw_celery.pool import child_state, dispatch, requests
from gw_celery.pool import request as pool_request
from gw_celery.protocol import frames

SLOTS = {"embed": 2, services.PLAIN: 1}
DIED = "Worker exited prematurely: signal 9 (SIGKILL)"


class Request:
    """Stands for Celery's request: the job's callbacks are its methods."""

    task = SimpleNamespace(acks_late=True)

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.is_revoked = False

    id = "the request's"

    def reject(self, requeue: bool) -> None:
        self.heard.append(("rejected", requeue))

    def revoked(self) -> bool:
        if self.is_revoked:
            self.heard.append("revoked")
        return self.is_revoked

    def on_accepted(self, pid: int, started: float) -> None:
        self.heard.append(("accepted", pid))

    def on_success(self, outcome: tuple[Any, ...]) -> None:
        failed, value, _ = outcome
        self.heard.append(str(value) if failed else value)

    def on_failure(self, einfo: Any) -> None:
        self.heard.append(einfo.type)

    def on_timeout(self, is_soft: bool, limit: float) -> None:
        self.heard.append(("soft limit" if is_soft else "hard limit", limit))

    def options(self, **limits: float) -> dict[str, Any]:
        return {
            "accept_callback": self.on_accepted,
            "callback": self.on_success,
            "error_callback": self.on_failure,
            "timeout_callback": self.on_timeout,
            **limits,
        }


class Child:
    """What the pool sees of a process: its room, what it holds, and what it was told."""

    def __init__(self, pid: int = 100) -> None:
        self.pid = pid
        deadlines = child_state.Deadlines.of(conf.Settings())
        self.life = child_state.Life(deadlines=deadlines, now=pool_request.now())
        self.room = dispatch.Room(SLOTS)
        self.jobs: dict[int, pool_request.Job] = {}
        self.served = 0
        self.is_unfit = False
        self.is_ill = False
        self.told: list[tuple[Any, ...]] = []

    def send(self, *orders: tuple[Any, ...]) -> None:
        self.told += orders

    @property
    def runs(self) -> list[str]:
        return [
            order[3]
            for order in self.told
            if order[0] in (frames.Order.RUN, frames.Order.RUN_ALONE)
        ]

    @property
    def stopped(self) -> list[int]:
        return [order[1] for order in self.told if order[0] == frames.Order.STOP]


class Shared:
    """Counts in a Redis that answers when the test says so."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts
        self.asked: list[tuple[str, Callable[[int | None], None]]] = []
        self.forgotten: list[str] = []
        self.is_full = self.is_away = self.is_closed = False

    def ask(self, task_id: str, then: Callable[[int | None], None]) -> bool:
        if not self.is_full:
            self.asked.append((task_id, then))
        return not self.is_full

    def settle(self) -> None:
        while self.asked and not self.is_away:
            task_id, then = self.asked.pop(0)
            then(self.counts.get(task_id))

    def record(self, task_id: str, *, is_alone: bool) -> None:
        self.counts[task_id] = self.counts.get(task_id, 0) + is_alone

    def forget(self, task_id: str) -> None:
        self.forgotten.append(task_id)

    def close(self) -> None:
        self.is_closed = True


class Pool:
    """Inputs, with children that are written by hand."""

    def __init__(self, *children: Child, shared: Any = None, **settings: Any) -> None:
        self.children = children or (Child(),)
        self.let_go: list[Any] = []
        self.stuck: list[Any] = []
        self.buried: list[tuple[str, int]] = []
        self.inputs = requests.Inputs(
            conf.Settings(**settings),
            self.let_go.append,
            self.stuck.append,
            shared,
            lambda job, reason, deaths: self.buried.append((job.task_id, deaths)),
        )
        self.requests: dict[pool_request.Job, Request] = {}

    def submit(
        self,
        task_id: str,
        *,
        is_redelivered: bool = False,
        retries: int = 0,
        headers: Mapping[str, Any] | None = None,
        **limits: float,
    ) -> pool_request.Job:
        request = {"retries": retries, "delivery_info": {"redelivered": is_redelivered}}
        request |= headers or {}
        args = ("proj.embed", task_id, request, b"body", "application/json", "utf-8")
        celerys = Request()
        job = self.inputs.submit(args, "embed", celerys.options(**limits), self.inputs.stop)
        self.requests[job] = celerys
        return job

    def dispatch(self, *ready: Child) -> set[Any]:
        return self.inputs.dispatch(ready or self.children)

    def start(self, task_id: str, *ready: Child, **given: Any) -> pool_request.Job:
        """Submit an input, and have its child say that it begins."""
        job = self.submit(task_id, **given)
        self.dispatch(*ready)
        self.accept(job)
        return job

    def report(self, job: pool_request.Job, kind: frames.Report, *rest: Any) -> None:
        self.inputs.handle(job.child, [kind, job.number, *rest], pool_request.now())

    def accept(self, job: pool_request.Job) -> None:
        self.report(job, frames.Report.ACCEPT, pool_request.now())

    def done(self, job: pool_request.Job, text: str = "'text'") -> None:
        self.report(job, frames.Report.DONE, text, 0.5)

    def die(self, child: Child, *, is_closing: bool = False) -> None:
        self.inputs.settle(child, DIED, is_closing=is_closing)

    def heard(self, job: pool_request.Job) -> list[Any]:
        return self.requests[job].heard
