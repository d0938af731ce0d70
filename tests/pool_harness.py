"""The real pool with scripted children, in one process, on a clock that the test moves.

The pool under test is ``gw_celery.pool:TaskPool``, driven as Celery's worker drives it: through
``worker_init``, the methods of a pool, and the event loop. What it starts as child processes are
``Child`` objects here: each holds the other end of the real socket and writes the real frames, but
only what the test has it write. So no test has to know how the pool is made inside::

    def test_an_answer_frees_the_slot(harness):
        request = harness.submit()
        child = harness.child(0)
        child.accept(request)
        child.done(request)
        assert request.heard == ["accepted", "done"]

- ``Harness(services={"work": 2}, replicas=1, **settings)``: slots of each service in a replica; the
  plain task ``plain`` has one. ``harness.start()`` returns once the children are started, which
  are READY after ``child.ready()``; the fixture ``harness`` of ``tests/unit/pool`` has done both.
- ``harness.submit(task, id, ...)`` gives the pool an input and returns its ``Request``.
- ``harness.child(number)`` is the child that fills a replica now, ``harness.children`` all so far.
- ``child.accept(request)``, ``.done``, ``.error``, ``.gone``, ``.beat``, ``.die``, ``.garbage``
  report; ``child.runs``, ``.stops``, ``.softs``, ``.is_draining``, ``.is_leaving`` are its orders.
- ``harness.advance(seconds)`` moves the clock and turns the loop at each timer.
- ``harness.revoke(request, terminate=...)`` and ``harness.stop(cold=...)`` do what Celery does.
- ``harness.check_settled()`` asserts that no input is held and that all slots are free.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import select
import signal as signals
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import kombu.asynchronous
import pytest
from celery import Celery
from celery import signals as celery_signals
from celery.utils.collections import LimitedSet
from celery.worker import control, state
from kombu.utils.imports import symbol_by_name

import gw_celery as gw
from gw_celery import signals as plan_holder

# -- what is known of the inside: a new layout changes these lines and no others --
from gw_celery.policy import scores
from gw_celery.pool import request_table, requests
from gw_celery.protocol import frames

POOL = "gw_celery.pool:TaskPool"
Order, Report, Outcome = frames.Order, frames.Report, frames.Outcome


def _keep_plan(patch: pytest.MonkeyPatch) -> None:
    """What is declared and decided for this worker is forgotten after the test."""
    patch.setattr(plan_holder, "_plan", None)
    patch.setattr(plan_holder, "_registries", [*plan_holder._registries])


def _is_run(order: tuple[Any, ...]) -> bool:
    """Whether an order is (what, number, task name, task id, request, body, type, encoding)."""
    return order[0] in (Order.RUN, Order.RUN_ALONE)


def _setup_of(first: tuple[Any, ...]) -> dict[str, Any]:
    """What a child learns from the first frame: its app, its replica's ``number`` and more."""
    (setup,) = first
    return dict(setup)


#: What takes an input, until it is in a child.
_TAKING = (
    requests.Requests.submit,
    requests.Requests._admit,
    requests.Requests.send,
    request_table.Queue.assign,
)


@contextmanager
def interrupted_move(
    step: int, act: Callable[[], None], *, is_taking: bool = False
) -> Iterator[list[str]]:
    """Call ``act`` in the middle of the next move of a request, as the handler of a signal is.

    Args:
        step: before which of the functions that the move calls.
        act: what the handler does.
        is_taking: not in the move itself, but in what takes an input and moves it.

    Yields:
        The name of that function, once it was called; empty where the move calls fewer.
    """
    reached: list[str] = []
    interrupted = _TAKING if is_taking else (request_table.RequestTable.move,)
    seen, codes = itertools.count(), [function.__code__ for function in interrupted]

    def profile(frame: types.FrameType, event: str, argument: Any) -> None:
        caller = frame.f_back
        is_step = event == "call" and caller is not None and caller.f_code in codes
        if is_step and next(seen) == step:
            sys.setprofile(None)
            reached.append(frame.f_code.co_name)
            act()

    sys.setprofile(profile)
    try:
        yield reached
    finally:
        sys.setprofile(None)


def _measurement(task: str, value: float | str) -> str:
    """The JSON of a score of one round, or of a failure."""
    if isinstance(value, str):
        return json.dumps({"failure": value})
    rounds = [scores.Round(elapsed=1.0, workload=value, latencies=(0.1,))]
    return json.dumps({"score": dataclasses.asdict(scores.of(task, rounds))})


def _failure(number: int, outcome: str, type_name: str, text: str, *, requeue: bool) -> list[Any]:
    traceback = f"Traceback: {text}"
    return [
        Report.ERROR,
        number,
        outcome,
        type_name,
        f"{type_name}({text!r})",
        text,
        traceback,
        requeue,
    ]


# -- the end of what is known of the inside --


class Request:
    """Stands for Celery's request, whose bound methods are the callbacks of an input.

    ``heard`` has what the pool told Celery, in order: ``"accepted"``, ``"done"``, ``"failed"``,
    ``"soft limit"``, ``"hard limit"``, ``"given back"``, ``"revoked"``, the name of an error's
    class, such as ``"WorkerLostError"``, or ``"acknowledged"`` where the pool itself did that.
    """

    def __init__(self, task_id: str, *, retries: int = 0, acks_late: bool = True) -> None:
        self.id = task_id
        self.retries = retries
        #: What the pool itself stored, by its state, and the exception that storing raises.
        self.stored: list[tuple[str, Any]] = []
        self.store_error: Exception | None = None
        self.store_errors, self._context = True, None
        #: What Celery has stored of it.
        self.state = "PENDING"
        backend = types.SimpleNamespace(
            persistent=True, store_result=self._store, get_state=lambda task_id: self.state
        )
        self.task = types.SimpleNamespace(acks_late=acks_late, backend=backend)
        self.heard: list[str] = []
        #: What came with an answer: the text of a result, or the exception.
        self.answer: Any = None
        #: billiard's record of that exception, where the pool made it.
        self.einfo: Any = None
        #: Of the process that it was accepted in.
        self.pid: int | None = None
        #: What ``apply_async`` returned; Celery holds it as the pool's handle.
        self.handle: Any = None
        self.acknowledged = False
        self.message: Any = None
        #: Called with each thing that is heard: a receiver of Celery's signals may raise.
        self.on_heard: Callable[[str], None] = lambda what: None

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.heard}>"

    def callbacks(self) -> dict[str, Any]:
        return {
            "accept_callback": self.on_accepted,
            "callback": self.on_success,
            "error_callback": self.on_failure,
            "timeout_callback": self.on_timeout,
            "correlation_id": self.id,
        }

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self.pid = pid
        self._hear("accepted")

    def on_success(self, outcome: tuple[Any, ...]) -> None:
        failed, self.answer, _ = outcome
        self._hear("failed" if failed else "done")

    def on_failure(self, einfo: Any) -> None:
        self.einfo = einfo
        self.answer = getattr(einfo.exception, "exc", einfo.exception)
        self._hear(einfo.type.__name__)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        self._hear("soft limit" if soft else "hard limit")

    def reject(self, requeue: bool = False) -> None:
        self._hear("given back" if requeue else "rejected")

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.acknowledged = True
            self.heard.append("acknowledged")

    def _store(self, task_id: str, result: Any, state: str, **_: Any) -> None:
        if self.store_error is not None:
            raise self.store_error
        self.stored.append((state, result))

    def revoked(self) -> bool:
        """Whether it was revoked; Celery then has stored that and acknowledged it."""
        is_revoked = self.id in state.revoked
        if is_revoked:
            self._hear("revoked")
        return is_revoked

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        self.on_heard(what)


class _Process:
    """What the pool sees of a child: the part of ``subprocess.Popen`` that it may use."""

    _pids = itertools.count(50_001)

    def __init__(self, command: Any, *, pass_fds: Any, **options: Any) -> None:
        self.args = command
        self.options = options
        self.pid = next(self._pids)
        self.returncode: int | None = None
        self.socket = socket.socket(fileno=os.dup(pass_fds[0]))
        self.socket.setblocking(False)
        #: What it was told is read while its socket is open.
        self.before_end: Callable[[], None] = lambda: None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        self.end(-signum)

    def terminate(self) -> None:
        self.send_signal(signals.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signals.SIGKILL)

    def end(self, code: int) -> None:
        if self.returncode is None:
            self.before_end()
            self.returncode = code
            self.socket.close()


class Child:
    """The child's side of the socket, in the hands of a test."""

    def __init__(self, harness: Harness, process: _Process) -> None:
        self._harness = harness
        self._process = process
        self._unpacker = frames.Unpacker(frames.MAX_PARENT_FRAME_BYTES)
        self._orders: list[tuple[Any, ...]] = []
        self._setup: dict[str, Any] | None = None
        #: The pool's number of each input, by its id and how often it was retried.
        self._numbers: dict[tuple[str, int], int] = {}
        process.before_end = self._read
        #: While time passes, it beats, and while a worker stops, it ends when it is told to leave.
        self.hangs = False

    def __repr__(self) -> str:
        return f"<Child of replica {self.number}, pid {self.pid}>"

    # -- what it is --

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def number(self) -> int:
        """The replica that it fills."""
        self._read()
        assert self._setup is not None, "the pool has not written the first frame"
        return int(self._setup["number"])

    @property
    def environment(self) -> dict[str, str]:
        """What its process was started with."""
        return dict(self._process.options["env"])

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code; minus the signal that ended it, ``-9`` where the pool did."""
        return self._process.returncode

    # -- what it was told --

    @property
    def orders(self) -> list[tuple[Any, ...]]:
        """All orders so far but the first frame."""
        self._read()
        return self._orders

    @property
    def runs(self) -> list[str]:
        """The ids of the inputs that it was given, in order."""
        return [order[3] for order in self.orders if _is_run(order)]

    @property
    def alone(self) -> list[str]:
        """Those of them that share no call with others."""
        return [order[3] for order in self.orders if order[0] == Order.RUN_ALONE]

    @property
    def stops(self) -> list[str]:
        """The ids of the inputs that it was told to stop."""
        return self._of(Order.STOP)

    @property
    def softs(self) -> list[str]:
        """The ids of the inputs in which it was told to raise a soft limit."""
        return self._of(Order.SOFT)

    @property
    def probed(self) -> list[str]:
        """The methods of the probes that it was told to call, in order."""
        return [order[3] for order in self.orders if order[0] == Order.PROBE]

    @property
    def benchmarked(self) -> list[str]:
        """The tasks that it was told to measure, in order."""
        return [order[2] for order in self.orders if order[0] == Order.BENCHMARK]

    @property
    def is_draining(self) -> bool:
        return any(order[0] == Order.DRAIN for order in self.orders)

    @property
    def is_leaving(self) -> bool:
        return any(order[0] == Order.LEAVE for order in self.orders)

    # -- what it reports --

    def ready(self) -> None:
        """Report that the app is imported and everything is entered."""
        self.report([Report.LOADED], [Report.ENTERED])

    def accept(self, request: Request) -> None:
        """Report that the body of an input starts."""
        self.report([Report.ACCEPT, self._number(request), time.monotonic()])

    def done(self, request: Request, text: str = "'text'") -> None:
        self.report([Report.DONE, self._number(request), text, 0.5])

    def error(
        self,
        request: Request,
        text: str = "why",
        *,
        type_name: str = "builtins.ValueError",
        outcome: str = Outcome.FAILURE,
        requeue: bool = False,
    ) -> None:
        number = self._number(request)
        self.report(_failure(number, outcome, type_name, text, requeue=requeue))

    def gone(self, request: Request) -> None:
        """Report that it no longer holds an input, and has no answer."""
        self.report([Report.GONE, self._number(request)])

    def answer_probe(
        self, is_ok: bool = True, *, method: str | None = None, detail: str = "because"
    ) -> None:
        """Report the outcome of the last call of a probe, of any or of one."""
        calls = [one for one in self.orders if one[0] == Order.PROBE and method in (None, one[3])]
        self.report([Report.PROBED, calls[-1][1], is_ok, detail, 0.01])

    def measured(self, value: float | str) -> None:
        """Report what the last benchmark gave: a score, or why there is none."""
        order = [one for one in self.orders if one[0] == Order.BENCHMARK][-1]
        self.report([Report.MEASURED, order[1], _measurement(order[2], value)])

    def fail_to_load(self, reason: str) -> None:
        self.report([Report.FAILED, reason])
        self.die(code=1)

    def beat(self, lag: float = 0.0, resident_bytes: int = 0) -> None:
        self.report([Report.BEAT, lag, resident_bytes])

    def report(self, *reports: list[Any]) -> None:
        """Write a frame of reports; the pool follows it at once."""
        self.write(frames.pack_reports(reports))

    def write(self, data: bytes) -> None:
        """Write bytes; the pool follows them at once."""
        self._read()
        self._process.socket.sendall(data)
        self._harness.poll()

    def garbage(self) -> None:
        """Write what no child of this version writes."""
        self.report(["nonsense"])

    def die(self, signum: int = signals.SIGKILL, *, code: int | None = None) -> None:
        """End; with an exit code where one is given, else by a signal."""
        self._read()
        self._process.end(-signum if code is None else code)
        self._harness.poll()

    # -- inside --

    def _of(self, what: Any) -> list[str]:
        ids = {number: task_id for (task_id, _), number in self._numbers.items()}
        return [ids[order[1]] for order in self.orders if order[0] == what]

    def _number(self, request: Request) -> int:
        self._read()
        key = (request.id, request.retries)
        assert key in self._numbers, f"{self} was not given {request}, but {self.runs}"
        return self._numbers[key]

    def _read(self) -> None:
        if not self.is_alive:
            return
        data = bytearray()
        while select.select([self._process.socket], [], [], 0)[0]:
            if not (read := self._process.socket.recv(1 << 20)):
                break
            data += read
        for payload in self._unpacker.feed(bytes(data)):
            self._take(frames.unpack_orders(payload))

    def _take(self, orders: list[Any]) -> None:
        if self._setup is None:
            self._setup, orders = _setup_of(orders[0]), orders[1:]
        self._orders += orders
        runs = [order for order in orders if _is_run(order)]
        self._numbers |= {(order[3], order[4]["retries"]): order[1] for order in runs}


class _Timer:
    """A timer of the loop, as kombu's."""

    def __init__(self, due: float, call: Callable[[], Any], every: float | None = None) -> None:
        self.due = due
        self.call = call
        self.every = every
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class _Hub:
    """The worker's event loop, as far as a pool uses kombu's; the harness turns it."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self.readers: dict[int, Callable[[], Any]] = {}
        self.timers: list[_Timer] = []
        self.on_tick: set[Callable[[], Any]] = set()
        self._ready: set[Any] = set()
        #: Called at every turn of a stopping worker.
        self.meanwhile: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        self.readers[number] = lambda: callback(*args)

    def remove_reader(self, fd: Any) -> None:
        self.readers.pop(fd if isinstance(fd, int) else fd.fileno(), None)

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        callback(*args)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> _Timer:
        return self._add(delay, lambda: callback(*args))

    def call_repeatedly(self, delay: float, callback: Callable[..., Any], *args: Any) -> _Timer:
        return self._add(delay, lambda: callback(*args), delay)

    def _add(self, delay: float, call: Callable[[], Any], every: float | None = None) -> _Timer:
        timer = _Timer(self._harness.now + delay, call, every)
        self.timers.append(timer)
        return timer

    def poll(self) -> None:
        """Turn once: what waits to be read is read, then whatever is called at each turn."""
        for _ in range(1000):
            readable, _, _ = select.select(list(self.readers), [], [], 0)
            if not readable:
                break
            for fd in readable:
                self.readers[fd]()
        else:
            raise AssertionError("the pool does not read what makes its descriptor readable")
        for callback in list(self.on_tick):
            callback()

    def next_due(self) -> float | None:
        self.timers = [one for one in self.timers if not one.is_cancelled]
        return min((one.due for one in self.timers), default=None)

    def fire(self) -> None:
        """Call the timers that are due."""
        for timer in [one for one in self.timers if one.due <= self._harness.now]:
            if timer.is_cancelled:
                continue
            if timer.every is None:
                timer.cancel()
            else:
                timer.due += timer.every
            timer.call()

    def fire_timers(self) -> None:
        """A stopping worker's turn, which the pool makes while it waits: time passes here."""
        self._harness.now += 0.1
        try:
            self.meanwhile()
        except Exception as exc:  # the pool logs it and goes on, as it must with Celery's
            self.error = self.error or exc


class _Worker:
    """Stands for Celery's ``WorkController`` at ``worker_init``."""

    pool_cls = POOL
    hostname = "harness@test"
    prefetch_multiplier = 1
    autoscale = autoscaler_cls = None

    def __init__(self, app: Celery, concurrency: int) -> None:
        self.app = app
        self.options: dict[str, Any] = {}
        self.concurrency = concurrency


class Harness:
    """One worker's pool; see the head of this module.

    Args:
        services: slots in one replica of each service; a name that begins with ``batch`` is of a
            batched task.
        replicas: how many there are.
        declare: declares more on the app, with slots of its own.
        options: of the worker, for its pool: ``maxtasksperchild``, ``max_memory_per_child``.
        settings: of the worker, without their ``gw_``.
    """

    def __init__(
        self,
        services: Mapping[str, int] | None = None,
        *,
        replicas: int = 1,
        declare: Callable[[gw.App], Any] = lambda app: None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._declare = declare
        self._options = options or {}
        self._services = {"work": 2} if services is None else dict(services)
        self._replicas = replicas
        self._settings = settings
        #: Of its tasks: another worker's declarations stay in this process.
        self._prefix = f"harness{next(_harnesses)}"
        self._ids = itertools.count(1)
        self._started: list[Child] = []
        self._hub = _Hub(self)
        #: What ``time.monotonic()`` shows.
        self.now = time.monotonic()
        self.requests: list[Request] = []
        self.is_stopped = False
        self.pool: Any = None
        self.app: Any = None
        #: Stands for Celery's ``WorkController``.
        self.worker: Any = None

    # -- the worker --

    @contextmanager
    def running(self, make: Callable[[], Any] | None = None) -> Iterator[Harness]:
        """Start the pool; whatever it left running is ended with the block.

        Args:
            make: as for ``start``.
        """
        with pytest.MonkeyPatch.context() as patch:
            self._replace_surroundings(patch)
            loop = kombu.asynchronous.get_event_loop()
            kombu.asynchronous.set_event_loop(self._hub)
            try:
                try:
                    self.start(make)
                except SystemExit:
                    self.is_stopped = True  # it was refused, and started nothing
                    raise
                yield self
            finally:
                if self.pool is not None and not self.is_stopped:
                    self.pool.terminate()
                kombu.asynchronous.set_event_loop(loop)

    def start(self, make: Callable[[], Any] | None = None) -> None:
        """Make the pool as Celery's worker does, and let it start its children.

        Args:
            make: returns a worker after ``worker_init``; without it, it is one of the services of
                this harness.
        """
        global celery_app
        worker = self.worker = self._made() if make is None else make()
        celery_app = self.app = worker.app
        self.pool = symbol_by_name(POOL)(
            worker.concurrency,
            initargs=(self.app, worker.hostname),
            timeout=None,
            soft_timeout=None,
            putlocks=False,
            app=self.app,
            **self._options,
        )
        self.pool.start()
        self.pool.register_with_event_loop(self._hub)
        self.poll()

    def stop(self, *, cold: bool = False, meanwhile: Callable[[], None] | None = None) -> None:
        """Stop the worker, warm or cold; children that are told to leave do.

        Args:
            meanwhile: called again and again while the pool waits, ten times a second.
        """
        self._hub.meanwhile = lambda: self._turn_while_stopping(meanwhile)
        state.should_terminate = True if cold else None
        try:
            if cold:  # the handler of the signal does it, before the worker closes its pool
                self.pool.flush()
            self.pool.close()
            self.pool.flush()
            self.pool.stop()
        finally:
            state.should_terminate = None
            self.is_stopped = True
        if self._hub.error is not None:
            raise self._hub.error

    def terminate(self) -> None:
        """End the pool, as Celery does after the handler of a cold shutdown."""
        self._hub.meanwhile = lambda: self._turn_while_stopping(None)
        try:
            self.pool.terminate()
        finally:
            self.is_stopped = True

    def poll(self) -> None:
        """Let the pool read what children wrote."""
        self._hub.poll()

    def advance(self, seconds: float) -> None:
        """Let time pass: the loop turns whenever a timer is due, and children beat."""
        end = self.now + seconds
        while (due := self._hub.next_due()) is not None and due <= end:
            self.now = max(self.now, due)
            self._beat()
            self._hub.fire()
            self.poll()
        self.now = end
        self.poll()

    def skip(self, seconds: float) -> None:
        """Let time pass in which nothing is due, and children beat; for days."""
        self.now += seconds
        for timer in self._hub.timers:
            timer.due = max(timer.due, self.now)
        self._beat()
        self.poll()

    # -- inputs --

    def submit(
        self,
        task: str = "work",
        task_id: str | None = None,
        *,
        is_redelivered: bool = False,
        retries: int = 0,
        headers: Mapping[str, Any] | None = None,
        soft: float | None = None,
        hard: float | None = None,
        acks_late: bool = True,
    ) -> Request:
        """Give the pool one input, as Celery does when a message came.

        Args:
            task: a service, or ``plain``; or the full name of a task that ``declare`` declared.
            task_id: a new one, unless one is given.
            is_redelivered: the broker has delivered the message before.
            retries: how often the task was retried.
            headers: others of the message.
            soft: soft time limit in seconds.
            hard: hard time limit in seconds.
            acks_late: the message is acknowledged when it is answered.
        """
        task_id = task_id or f"input-{next(self._ids)}"
        request = Request(task_id, retries=retries, acks_late=acks_late)
        context = {
            "id": request.id,
            "retries": retries,
            "delivery_info": {"redelivered": is_redelivered, "routing_key": f"cpu.{task}"},
            **(headers or {}),
        }
        request.handle = self.pool.apply_async(
            lambda *args: None,
            (
                task if "." in task else f"{self._prefix}.{task}",
                request.id,
                context,
                b"body",
                "application/json",
                "utf-8",
            ),
            soft_timeout=soft,
            timeout=hard,
            **request.callbacks(),
        )
        self.requests.append(request)
        self.poll()
        return request

    def revoke(self, request: Request, *, terminate: bool = False) -> None:
        """Revoke an input, as the control command does."""
        state.revoked.add(request.id)
        if terminate:
            self.pool.terminate_job(request.pid or 0, signals.SIGTERM)
            request.handle.terminate(signals.SIGTERM)
        self.poll()

    # -- children --

    @property
    def children(self) -> list[Child]:
        """Every child that was started, the dead ones too, in the order of their starts."""
        return list(self._started)

    def child(self, number: int = 0) -> Child:
        """The newest child of a replica."""
        return [one for one in self._started if one.number == number][-1]

    def child_of(self, request: Request) -> Child:
        """The child that was given an input, the last time."""
        return [one for one in self._started if request.id in one.runs][-1]

    # -- what is seen --

    def replica(self, number: int = 0) -> dict[str, Any]:
        """What ``inspect stats`` shows of a replica, as of now."""
        (found,) = [one for one in self.info()["gw_replicas"] if one["number"] == number]
        return found

    def info(self) -> dict[str, Any]:
        """What ``inspect stats`` shows of the pool, as of now."""
        self.advance(1.0)  # it is the picture of the last second
        info: dict[str, Any] = self.pool.info
        return info

    def check_settled(self) -> None:
        """Assert that no input is held, none counts as waiting or running, and all slots are free.

        Raises:
            AssertionError: where an input, a slot or a count was lost.
        """
        info = self.info()
        assert [one["in_flight"] for one in info["gw_replicas"] if one["in_flight"]] == []
        for service, counters in info["gw_tallies"].items():
            assert (counters["waiting_inputs"], counters["running_inputs"]) == (0, 0), service
            settled = counters["served_inputs"] + counters["given_back_inputs"]
            assert counters["arrived_inputs"] == settled, service
        ready = [
            self.child(one["number"]) for one in info["gw_replicas"] if one["state"] == "ready"
        ]
        for service, slots in {**self._services, "plain": 1}.items():
            given = [self.submit(service) for _ in range(slots * len(ready))]
            for request in given:
                assert any(request.id in one.runs for one in ready), f"{service} has lost a slot"
            for request in given:
                child = self.child_of(request)
                child.accept(request)
                child.done(request)

    # -- inside --

    def _replace_surroundings(self, patch: pytest.MonkeyPatch) -> None:
        """The one seam of process starts, the clock, the loop, and what a worker makes global."""
        patch.setattr(subprocess, "Popen", self._popen)
        patch.setattr(time, "monotonic", lambda: self.now)
        for name in ("data", "meta"):
            patch.setattr(control.Panel, name, dict(getattr(control.Panel, name)))
        patch.setattr(sys.modules[__name__], "celery_app", None)
        patch.setattr(state, "revoked", LimitedSet())
        _keep_plan(patch)

    def _popen(self, command: Any, **options: Any) -> _Process:
        process = _Process(command, **options)
        self._started.append(Child(self, process))
        return process

    def _turn_while_stopping(self, meanwhile: Callable[[], None] | None) -> None:
        if meanwhile is not None:
            meanwhile()
        self._beat()
        for child in self._started:
            if child.is_alive and child.is_leaving and not child.hangs:
                child.die(code=0)

    def _beat(self) -> None:
        for child in self._started:
            if child.is_alive and not child.hangs:
                child.beat()

    def _made(self) -> _Worker:
        app = self._declared()
        worker = _Worker(app, self._slots * self._replicas)
        celery_signals.worker_init.send(sender=worker)
        return worker

    def _declared(self) -> Celery:
        """A Celery app with the services, which a child could import from this module."""
        global celery_app
        made = Celery(
            "harness", broker="memory://", backend="cache+memory://", set_as_current=False
        )
        gw.preset(made)
        made.conf.update({f"gw_{name}": value for name, value in self._settings.items()})
        app = gw.App("harness", made)
        for name, slots in self._services.items():
            _declare(app, name, slots, f"{self._prefix}.{name}")
        self._declare(app)
        self._slots = sum(one.max_inputs for one in app.registry.services.values()) + 1
        made.task(name=f"{self._prefix}.plain")(_body("plain"))
        made.finalize()
        queues = {one.queue for one in app.registry.services.values()}
        made.amqp.queues.select([*sorted(queues), "celery"])
        celery_app = made
        return made


_harnesses = itertools.count(1)
#: The app of the harness that runs now.
celery_app: Celery | None = None


def _declare(app: gw.App, name: str, slots: int, task_name: str) -> None:
    body = gw.concurrent(max_inputs=slots)(_body(name))
    if name.startswith("batch"):
        body = gw.batched(max_batch_size=slots, wait_ms=1000)(body)
    app.remote(gpu=gw.Gpu("CPU"), name=task_name)(body)


def _body(name: str) -> Any:
    async def body(x: Any = None) -> Any:
        raise AssertionError("bodies run in children, and these are scripted")

    body.__name__ = body.__qualname__ = name
    return body
