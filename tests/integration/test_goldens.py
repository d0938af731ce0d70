"""What crosses a process or is stored is what the golden files in ``tests/goldens`` say.

The files hold messages, keys of Redis, control commands, ``inspect stats`` and stored results.
Programs of other versions, and other workers, read all of it: see ``tests/golden.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import golden_app
import pytest
import redis

import gw_celery as gw
from gw_celery import testing
from tests import golden
from tests.processes import environment, eventually

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        celery.VERSION[:2] != (5, 7), reason="Celery's own headers are those of 5.7 in the files"
    ),
]

QUEUES = "cpu,celery"
AUTOSCALER = "gw_celery.autoscale:Autoscaler"


# -- messages --


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tasks of the golden app, sent over ``memory://``."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    app = celery.Celery(
        "golden", broker="memory://", backend="cache+memory://", set_as_current=False
    )
    gw.preset(app)
    declared = golden_app.declare(app)
    yield declared
    with app.connection_for_read() as connection:
        for queue in list(app.amqp.queues):
            connection.default_channel.queue_purge(queue)


def sent(task: Any, send: Callable[[], Any]) -> dict[str, Any]:
    """The one message that ``send`` puts into the queue of ``task``, normalised."""
    ids: dict[str, str] = {}
    send()
    service = getattr(task, "gw_service", None)
    queue = "celery" if service is None else service.queue
    with task.app.connection_for_read() as connection:
        message = eventually(lambda: connection.default_channel.basic_get(queue), 10)
        assert connection.default_channel.basic_get(queue) is None
    properties = {key: value for key, value in message.properties.items() if key != "delivery_info"}
    body = json.loads(message.body)
    shown = {
        "queue": queue,
        "content type": message.content_type,
        "content encoding": message.content_encoding,
        "delivery info": message.properties["delivery_info"],
        "headers": message.headers,
        "properties": properties,
        "body": body,
    }
    return golden.normal(shown, ids)


def awaited(call: Callable[[], Any]) -> None:
    """Await a call that is not answered for long enough to have sent it."""

    async def give_up() -> None:
        with contextlib.suppress(gw.CallTimeout):
            await call()

    asyncio.run(give_up())


def test_messages(tasks: Any) -> None:
    single, classify = tasks.single, tasks.Classifier(threshold=0.7).classify
    options = {"priority": 3, "expires": 600, "time_limit": 9, "soft_time_limit": 8}
    ways: dict[str, tuple[Any, Callable[[], Any]]] = {
        ".delay()": (single, lambda: single.delay(1)),
        ".apply_async() with options": (
            single,
            lambda: single.apply_async((1,), {"until": ""}, headers={"mine": "yes"}, **options),
        ),
        ".apply_async(countdown=)": (single, lambda: single.apply_async((1,), countdown=60)),
        ".spawn()": (single, lambda: single.spawn(1)),
        "await": (single, lambda: awaited(lambda: single.options(timeout=0.5)(1))),
        "a workload": (tasks.weighed, lambda: tasks.weighed.delay("four")),
        "a batched task": (tasks.batch, lambda: tasks.batch.delay(1)),
        "a class task without parameters": (
            classify.task,
            lambda: tasks.Classifier().classify.delay("text"),
        ),
        "a class task with a parameter": (classify.task, lambda: classify.delay("text")),
        "a class task with a list for a parameter": (
            classify.task,
            lambda: tasks.Classifier(labels=["x"]).classify.spawn("text"),
        ),
        "a chain": (single, (single.s(1) | tasks.plain.s()).apply_async),
        "a plain task": (tasks.plain, lambda: tasks.plain.delay(1)),
    }
    golden.check("messages", {way: sent(*how) for way, how in ways.items()})


def test_bodies_of_more_than_json_can_say(tasks: Any) -> None:
    values = [b"bytes", (1, 2), {3, 4}, {5: "five"}, float("inf"), None]
    golden.check(
        "bodies",
        [sent(tasks.single, lambda one=one: tasks.single.delay(one))["body"] for one in values],
    )


# -- a worker --


@pytest.fixture(scope="module")
def server(redis_server: testing.Server, tmp_path_factory: Any) -> Iterator[testing.Server]:
    """A Redis that nothing else writes to."""
    with testing.server(tmp_path_factory.mktemp("golden")) as private:
        yield private


@pytest.fixture(scope="module")
def worker(server: testing.Server) -> Iterator[testing.Worker]:
    """A worker on the GPU pool; this process's apps talk to its Redis."""
    settings = {"gw_replicas": 1, "gw_max_deaths": 1, "worker_autoscaler": AUTOSCALER}
    with testing.worker(
        "golden_app:celery",
        *("-Q", QUEUES, "-l", "INFO", "--autoscale", "1,1"),
        server=server,
        env={**environment(), "SETTINGS": json.dumps(settings)},
    ) as started:
        # Later than READY: the first answer of a liveness probe.
        eventually(lambda: all(one["is_ok"] is not None for one in probes(started)), 20)
        serve_all()
        yield started


def serve_all() -> None:
    """Have each service but the one that kills answer: some figures are there from then on."""
    tasks = golden_app.tasks
    calls = [
        tasks.single.delay(1),
        tasks.weighed.delay("four"),
        tasks.scored.delay(1),
        tasks.batch.delay(1),
        tasks.batch.delay(2),
        tasks.early.delay(""),
        tasks.fails.delay("why"),
        tasks.Classifier().classify.delay("text"),
        tasks.plain.delay(1),
    ]
    for call in calls:
        call.get(timeout=30, propagate=False)


def probes(worker: testing.Worker) -> list[dict[str, Any]]:
    return [probe for one in worker.replicas() for probe in one["probes"]]


class Stored:
    """What is in the two databases of a server: the broker's and that of the results."""

    def __init__(self, server: testing.Server) -> None:
        self.broker, self.results = (
            redis.Redis(unix_socket_path=str(server.socket), db=number) for number in (0, 1)
        )

    def shape(self) -> dict[str, Any]:
        """The keys, normalised, with the type and the shape of what each holds.

        kombu's own keys, which differ between its versions, are left out.
        """
        return {"broker": _keys(self.broker), "results": _keys(self.results)}

    def close(self) -> None:
        self.broker.close()
        self.results.close()


@pytest.fixture
def stored(server: testing.Server) -> Iterator[Stored]:
    made = Stored(server)
    yield made
    made.close()


def ask(worker: testing.Worker, command: str, /, **arguments: Any) -> Any:
    """The reply of the worker to one control command; ``None`` without one."""
    options = {"reply": True, "destination": [worker.node], "timeout": 5, "limit": 1}
    replies = golden_app.celery.control.broadcast(command, arguments, **options)
    return replies[0][worker.node] if replies else None


def _keys(client: redis.Redis) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for key in client.scan_iter():
        if b"_kombu." in key or b"pidbox" in key:
            continue
        kind = client.type(key).decode()
        if (held := _held(client, key, kind)) is not None:
            about = {"type": kind, "value": held, "expires": client.ttl(key) > 0}
            found.setdefault(golden.normal_key(key.decode()), []).append(about)
    return {key: golden.distinct(abouts) for key, abouts in found.items()}


def _held(client: redis.Redis, key: bytes, kind: str) -> Any:
    """The shape of what a key holds; ``None`` when it is gone by now."""
    if kind == "string":
        value = client.get(key)
        return None if value is None else golden.stored_shape(value)
    if kind == "hash":
        fields: dict[str, list[Any]] = {}
        for name, one in client.hgetall(key).items():
            shown = golden.normal_key(name.decode(errors="replace"))
            fields.setdefault(shown, []).append(golden.stored_shape(one))
        return {name: golden.distinct(shapes) for name, shapes in fields.items()}
    reads: dict[str, Callable[[], Any]] = {
        "list": lambda: client.lrange(key, 0, -1),
        "set": lambda: client.smembers(key),
        "zset": lambda: client.zrange(key, 0, -1),
    }
    return golden.distinct(map(golden.stored_shape, reads[kind]())) if kind in reads else None


def test_keys_of_redis(worker: testing.Worker, stored: Stored, tmp_path: Path) -> None:
    tasks, release = golden_app.tasks, tmp_path / "release"
    running = [tasks.single.delay(1, until=str(release)), tasks.early.delay(str(release))]
    eventually(lambda: len(ask(worker, "active")) == 2, 20)
    golden.wait_and_check("redis_while_inputs_run", stored.shape)
    release.touch()
    pair = [tasks.batch.delay(1), tasks.batch.delay(2)]
    for one in (*running, *pair):
        one.get(timeout=30)
    golden.wait_and_check("redis_after_answers", stored.shape)


def test_stored_results(worker: testing.Worker, stored: Stored) -> None:
    tasks = golden_app.tasks
    calls = {
        "success": tasks.single.delay(1),
        "batched": tasks.batch.delay(1),
        "batched, the other": tasks.batch.delay(2),
        "class task": tasks.Classifier(threshold=0.7).classify.delay("text"),
        "failure": tasks.fails.delay("why"),
        "plain": tasks.plain.delay(1),
    }
    found = {}
    for name, call in calls.items():
        call.get(timeout=20, propagate=False)
        key = f"celery-task-meta-{call.id}"
        record = json.loads(stored.results.get(key))
        record["traceback"] = record["traceback"] and _of_the_body(record["traceback"])
        found[name] = golden.normal({key: record})
    golden.check("results", found)


def _of_the_body(traceback: str) -> list[str]:
    """The frames of a traceback that are not Celery's, and its last line."""
    lines = traceback.strip().splitlines()
    return [one for one in lines if "File" in one and "trace.py" not in one] + lines[-1:]


def test_stats(worker: testing.Worker) -> None:
    golden.wait_and_check("stats", lambda: golden.shape(ask(worker, "stats")["pool"]), 10)


def listed(worker: testing.Worker, verb: str) -> list[str]:
    """Our commands of the kind ``verb`` with their arguments, as the command line lists them."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "golden_app:celery", verb, "--list"],
        env=environment({"CELERY_BROKER_URL": worker.broker_url}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    return [re.split(r" {2,}", line)[0] for line in lines if line.startswith("gw_")]


def test_control_commands(worker: testing.Worker) -> None:
    commands = {verb: listed(worker, verb) for verb in ("inspect", "control")}
    names = [line.split()[0] for lines in commands.values() for line in lines]
    status = ask(worker, "gw_status")
    replies: dict[str, Any] = {
        "gw_status": golden.shape(status),
        "gw_drain(replica=7)": ask(worker, "gw_drain", replica=7),
        "gw_restart(replica=7)": ask(worker, "gw_restart", replica=7),
        "gw_probe_tick": ask(worker, "gw_probe_tick"),
        "gw_benchmark_tick": ask(worker, "gw_benchmark_tick"),
        "gw_best_score(worker, scores)": ask(
            worker, "gw_best_score", worker="other@host", scores={"golden.scored": 1.0}
        ),
        "gw_drain(replica=0)": ask(worker, "gw_drain", replica=0),
        "gw_restart()": ask(worker, "gw_restart"),
    }
    worker.wait_ready()
    assert {name.partition("(")[0] for name in replies} == set(names)
    golden.check("control", {"commands": commands, "replies": golden.normal(replies)})


def test_keys_of_an_input_that_was_given_up(worker: testing.Worker, stored: Stored) -> None:
    before = stored.shape()
    given_up = golden_app.tasks.kills.delay()
    with pytest.raises(gw.errors.PoisonedInput):
        given_up.get(timeout=60)

    def new() -> dict[str, Any]:
        return {
            name: {key: about for key, about in keys.items() if key not in before[name]}
            for name, keys in stored.shape().items()
        }

    golden.wait_and_check("redis_after_a_poison_input", new)
