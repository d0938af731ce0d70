"""A replica's child in the process of a test: the real one, between a scripted parent and its app.

What serves is the child's own code from the socket on, with Celery's tracer and a result backend
that can be held. The test writes the parent's orders and reads the child's reports::

    def test_an_answer_is_reported(child):
        number = child.run(task.name, 1)
        assert child.outcome(number) == (Report.DONE, "1")

- ``Child(app, **settings)`` is a context manager; it serves all that ``app`` has declared so far.
- ``child.run(name, *args, **headers)`` sends an input and returns its number; ``child.soft``,
  ``child.stop``, ``child.send`` are other orders.
- ``child.outcome(number)`` waits for the report that ends an input, and ``child.told(number)``
  returns the kinds of all reports about it so far.
- ``child.store`` holds what is written to the result backend while ``child.store.go`` is clear;
  with ``child_of(app, backend=url)`` the results are written to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.app import trace
from celery.backends.cache import CacheBackend

import gw_celery as gw
from gw_celery import conf

# -- what is known of the inside: a new layout changes these lines and no others --
from gw_celery.cluster import fence
from gw_celery.protocol import frames
from gw_celery.replica import main, result_backends, tracer
from gw_celery.runtime import django_connections
from gw_celery.transport import find
from tests.processes import eventually

Order, Report, Outcome = frames.Order, frames.Report, frames.Outcome
#: Seconds that anything here may take.
DEADLINE = 30.0
_ENDS = (Report.DONE, Report.ERROR, Report.GONE)


class Store:
    """What the result backend writes: held while ``go`` is clear."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.is_held = threading.Event()
        self.states: list[str] = []
        #: The threads that wrote, and read.
        self.threads: list[str] = []

    def write(self, state: str) -> None:
        self.threads.append(threading.current_thread().name)
        if not self.go.is_set():
            self.is_held.set()
            assert self.go.wait(DEADLINE)
            self.is_held.clear()
        self.states.append(state)


class HeldBackend(CacheBackend):
    """Celery's memory backend, whose writes the test can hold."""

    store = Store()

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **more: Any) -> Any:
        self.store.write(state)
        return super()._store_result(task_id, result, state, *args, **more)

    def get_task_meta(self, *args: Any, **more: Any) -> Any:
        self.store.threads.append(threading.current_thread().name)
        return super().get_task_meta(*args, **more)


class _Link(main.ParentLink):
    def connection_lost(self, exc: Exception | None) -> None:
        """Without its parent a child ends its process: not here."""


class Child:
    """The child, and its parent's end of the socket."""

    def __init__(self, app: gw.App, celery_app: Celery, backend: str, worker: str | None) -> None:
        self._app = celery_app
        self._backend = backend
        self._worker = worker
        self._queues = [service.queue for service in app.registry.services.values()]
        self._ours, self._theirs = socket.socketpair()
        self._ours.settimeout(0.02)
        self._unpacker = frames.Unpacker(frames.MAX_CHILD_FRAME_BYTES)
        self._entered = threading.Event()
        self._numbers = itertools.count(1)
        self._name = uuid.uuid4()
        self._failure: BaseException | None = None
        self.reports: list[list[Any]] = []
        #: Of the server of its results, which a process need not close.
        self.clients: list[Any] = []
        #: The tasks of the loop that a child which has left would not have ended.
        self.left_behind: list[str] = []
        self.store = HeldBackend.store = Store()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._app.backend_cls = self._backend
        self._app.conf.gw_show_values = True  # ``outcome`` has the text of an answer
        link = _Link()
        around = django_connections.around(self._app)
        store_timeout = conf.read(self._app.conf).store_timeout
        result_backends.install(self._app, around, store_timeout, link)
        self._app.finalize()
        tracer.prepare(self._app, "unit@host")
        trace._localized[:] = [self._app._tasks, None, "unit@host"]
        self._link = link
        self.thread.start()
        assert self._entered.wait(DEADLINE)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self.store.go.set()
        with contextlib.suppress(BrokenPipeError):  # it has left
            self.send(Order.LEAVE)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        self._ours.close()
        trace._localized[:] = []

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        try:
            self._running = asyncio.get_running_loop()
            transport, _ = await self._running.create_connection(
                lambda: self._link, sock=self._theirs
            )
            setup = {"hostname": "unit@host", "queues": self._queues, "worker": self._worker}
            services = main.Services(self._link, self._app, setup)
            await services.enter()
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            self._entered.set()
        await self._link.leaving.wait()
        await services.leave()
        for client in self.clients:
            await client.aclose()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        self.left_behind = sorted(task.get_name() for task in rest)
        transport.abort()
        await asyncio.sleep(0)

    # -- orders --

    def send(self, *order: Any) -> None:
        self.send_together(order)

    def send_together(self, *orders: tuple[Any, ...]) -> None:
        """Send orders in one frame: nothing happens in the child between them."""
        self._ours.sendall(frames.pack_orders(orders))

    def run(
        self,
        name: str,
        *args: Any,
        alone: bool = False,
        embed: Mapping[str, Any] | None = None,
        **request: Any,
    ) -> int:
        """Send an input of the task ``name``; what else is given are headers of its message.

        Args:
            alone: it runs alone.
            embed: what its message holds beside the arguments: callbacks, a chord.
        """
        number = next(self._numbers)
        sent = {"id": self.id(number), "task": name, "delivery_info": {}, **request}
        body = (args, {}, dict(embed or {}))
        order = Order.RUN_ALONE if alone else Order.RUN
        self.send(order, number, name, sent["id"], sent, body, None, None)
        return number

    def id(self, number: int) -> str:
        """The task's id of an input; the memory of the backend is one for all tests."""
        return f"{self._name}-{number}"

    def soft(self, number: int, seconds: float = 5.0) -> None:
        self.send(Order.SOFT, number, seconds)

    def stop(self, number: int) -> None:
        self.send(Order.STOP, number)

    def settle(self) -> None:
        """Return when the child has carried out all orders so far, and its loop has turned."""
        running = asyncio.run_coroutine_threadsafe(self._turn(), self._running)
        running.result(DEADLINE)

    def call(self, fn: Callable[[], Any]) -> None:
        """Call ``fn`` on the loop of the child."""
        self._running.call_soon_threadsafe(fn)

    async def _turn(self) -> None:
        # The orders are in the socket: the loop reads it at each of its turns.
        for _ in range(5):
            await asyncio.sleep(0)

    # -- reports --

    def outcome(self, number: int) -> tuple[Any, ...]:
        """The report that ends an input: its kind, and what matters of the rest."""
        kind, _, *content = eventually(lambda: self._about(number, _ENDS))
        if kind == Report.GONE:
            return (kind,)
        if kind == Report.DONE:
            return kind, content[0]
        outcome, name, *_ = content
        return kind, outcome, name.rpartition(".")[2]

    def told(self, number: int) -> list[str]:
        """The kinds of all reports about an input so far."""
        self._receive()
        return [report[0] for report in self.reports if report[1:2] == [number]]

    def result(self, number: int) -> Any:
        """What the result backend has for an input."""
        return self._app.AsyncResult(self.id(number)).result

    def outages(self) -> list[str]:
        """Why the result backend was reported away, and ``""`` each time that it was back."""
        self._receive()
        return [report[1] for report in self.reports if report[0] == Report.OUTAGE]

    def answer(self, kind: Report, number: int) -> list[Any]:
        """What a probe or a benchmark reported under its number."""
        report = eventually(lambda: self._about(number, (kind,)))
        return list(report[2:])

    def _about(self, number: int, kinds: tuple[Report, ...]) -> list[Any] | None:
        self._receive()
        found = [one for one in self.reports if one[0] in kinds and one[1] == number]
        return found[0] if found else None

    def _receive(self) -> None:
        try:
            data = self._ours.recv(65536)
        except TimeoutError:
            return
        for payload in self._unpacker.feed(data):
            self.reports += frames.unpack_reports(payload)


@contextmanager
def child_of(
    app: gw.App,
    *,
    backend: str = f"{__name__}:HeldBackend+memory://",
    worker: str | None = None,
    **settings: Any,
) -> Iterator[Child]:
    """Have a child serve all that ``app`` has declared.

    Args:
        backend: URL of the result backend; by default the memory that the test can hold.
        worker: the start of the worker that its records of early acknowledgements are kept for.
        settings: Celery's and ours.
    """
    celery_app: Any = app.celery
    celery_app.conf.update(settings)
    conf.read(celery_app.conf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.gw_celery_signals, "registries", lambda: (app.registry,))
        patch.setattr(main, "CLOSE_TIMEOUT", 0.2)
        patch.setattr(fence, "PAUSE", 0.02)
        child = Child(app, celery_app, backend, worker)
        connect = find.async_client

        def noted(*args: Any, **options: Any) -> Any:
            child.clients.append(connect(*args, **options))
            return child.clients[-1]

        patch.setattr(find, "async_client", noted)
        child.start()
        try:
            yield child
        finally:
            child.close()
