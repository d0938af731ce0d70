"""Workers on the GPU pool, for tests: started, asked what they do, and their work counted."""

from __future__ import annotations

import collections
import contextlib
import json
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ledger
import pooled
import pytest
import redis
from celery import Celery

import gw_celery as gw
from gw_celery import testing
from gw_celery.testing.workers import close_results
from tests.processes import StartWorker, WorkerProcess, eventually, workers

QUEUES = "cpu,celery"
#: An event that a listener sends to itself.
_HEARD = "test-heard"

#: ``start`` with its worker and its ledger given: the fixture ``start_pooled``.
StartPooled = Callable[..., WorkerProcess]


def start(
    start_worker: StartWorker,
    ledger_path: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    replicas: int = 1,
    is_loaded: bool = True,
    module: str = "pooled",
    **options: Any,
) -> WorkerProcess:
    """Start a worker of ``module`` and wait until all of its replicas are READY."""
    given = {"gw_replicas": replicas, **(settings or {})}
    env = {"LEDGER": str(ledger_path), "SETTINGS": json.dumps(given), **(env or {})}
    worker = start_worker(f"{module}:celery", env=env, **{"queues": QUEUES, **options})
    if is_loaded and options.get("wait_ready", True):
        wait_loaded(worker, replicas)
    return worker


@contextmanager
def module_worker(
    server: testing.Server, places: pytest.TempPathFactory, **given: Any
) -> Iterator[WorkerProcess]:
    """A worker that all tests of a module share; this process's apps talk to its server.

    It finds nothing that earlier tests left there.
    """
    with redis.Redis(unix_socket_path=str(server.socket)) as left:
        left.flushall()
    directory = places.mktemp("worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", server.broker_url)
        patch.setenv("CELERY_RESULT_BACKEND", server.result_url)
        with workers(directory, server.broker_url, server.result_url) as start_worker:
            yield start(start_worker, directory / "ledger", **given)


def ledger_of(worker: WorkerProcess) -> Path:
    """What a worker that a module shares writes: it is beside its log."""
    return worker.log.parent / "ledger"


@contextmanager
def client(broker: str, result: str) -> Iterator[Celery]:
    """An app that sends tasks by name to servers that are not the test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", broker)
        patch.setenv("CELERY_RESULT_BACKEND", result)
        with Celery("client", set_as_current=False) as app:
            gw.preset(app)
            yield app
            close_results(app)


def ask(worker: WorkerProcess, what: str, app: Any = pooled.celery, **arguments: Any) -> Any:
    """The answer of this worker alone to one ``inspect`` command."""
    inspect = app.control.inspect(destination=[worker.node], timeout=15)
    return (getattr(inspect, what)(**arguments) or {}).get(worker.node)


def tell(worker: WorkerProcess, what: str, **arguments: Any) -> Any:
    """The answer of this worker alone to one control command."""
    options = {"reply": True, "destination": [worker.node], "timeout": 15}
    (answer,) = pooled.celery.control.broadcast(what, arguments, **options)
    return answer[worker.node]


def replicas(worker: WorkerProcess, app: Any = pooled.celery) -> list[dict[str, Any]]:
    """What ``inspect stats`` says of each replica."""
    stats = eventually(lambda: ask(worker, "stats", app), 20)
    listed: list[dict[str, Any]] = stats["pool"]["gw_replicas"]
    return listed


def ready_pids(worker: WorkerProcess, app: Any = pooled.celery) -> list[int]:
    return [one["pid"] for one in replicas(worker, app) if one["state"] == "ready"]


def in_flight(worker: WorkerProcess, app: Any = pooled.celery) -> int:
    return sum(one["in_flight"] for one in replicas(worker, app))


def ready_pid(worker: WorkerProcess) -> int:
    """The child of a worker's only replica; what stats shows is a picture of a second ago."""
    (pid,) = eventually(lambda: ready_pids(worker), 20)
    return pid


def pids_of_all(worker: WorkerProcess, count: int) -> list[int]:
    """The children of ``count`` replicas, once stats shows every one of them as READY."""
    return eventually(lambda: found if len(found := ready_pids(worker)) == count else [], 20)


def queued(server: testing.Server, name: str) -> int:
    """How many messages of a queue no worker has taken."""
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        return int(client.llen(name))


def wait_loaded(worker: WorkerProcess, count: int = 1) -> None:
    """Wait until the log has told of ``count`` READY replicas."""
    eventually(
        lambda: worker.exit_code is not None or worker.log_text().count("is ready\n") >= count, 40
    )
    assert worker.exit_code is None, worker.log_tail()


def began(path: Path, name: str) -> list[int]:
    """The pids in which the body of ``name`` began, in order."""
    return [int(line[0]) for line in ledger.words(path, "began") if line[2] == name]


def wrote(path: Path, *words: str) -> int:
    """How many lines of the ledger have these words after the pid."""
    return [line[1:] for line in ledger.read(path)].count(list(words))


def counts(path: Path, names: Iterable[str]) -> dict[str, int]:
    """What became of inputs that each have a name of their own."""
    sent = set(names)
    started = collections.Counter(line[2] for line in ledger.words(path, "began"))
    ended = collections.Counter(line[2] for line in ledger.words(path, "ended"))
    return {
        "sent": len(sent),
        "finished once": sum(ended[name] == 1 for name in sent),
        "finished twice": sum(ended[name] > 1 for name in sent),
        "started twice": sum(started[name] > 1 for name in sent),
        "lost": sum(ended[name] == 0 for name in sent),
    }


def all_once(names: Iterable[str], **but: int) -> dict[str, int]:
    """``counts`` of inputs that all finished, and nothing ran again, with what differs."""
    total = len(set(names))
    right = {
        "sent": total,
        "finished once": total,
        "finished twice": 0,
        "started twice": 0,
        "lost": 0,
    }
    return right | {key.replace("_", " "): value for key, value in but.items()}


@contextmanager
def events(
    kind: str, app: Any = pooled.celery, noted: Callable[[Any], Any] = operator.itemgetter("uuid")
) -> Iterator[list[Any]]:
    """The ids of the tasks that workers send events of this kind about, as they come.

    Args:
        kind: of the events; ``"*"``: of all.
        app: whose workers they are.
        noted: what is kept of an event, instead of its task's id.
    """
    seen: list[Any] = []
    listens, is_over = threading.Event(), threading.Event()
    handlers = {
        kind: lambda event: seen.append(noted(event)),
        _HEARD: lambda event: listens.set(),
    }
    listener = threading.Thread(target=_listen, args=(app, handlers, listens, is_over), name=kind)
    listener.start()
    assert listens.wait(10)
    try:
        yield seen
    finally:
        is_over.set()
        listener.join()


def _listen(app: Any, handlers: Any, listens: threading.Event, is_over: threading.Event) -> None:
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers=handlers)
        with (
            receiver.consumer_context() as (established, _, _),
            app.connection_for_write() as writing,
            app.events.Dispatcher(writing, enabled=True) as tell,
        ):
            while not is_over.is_set():
                # On Redis it is a while before what is sent reaches a listener.
                if not listens.is_set():
                    tell.send(_HEARD)
                with contextlib.suppress(TimeoutError):
                    established.drain_events(timeout=0.1)
