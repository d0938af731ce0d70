from __future__ import annotations

import asyncio
import contextvars
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from celery.utils import imports

from gw_celery import conf
from gw_celery.client import execution
from gw_celery.replica import input as replica_input
from gw_celery.replica import result_backends
from gw_celery.runtime import greenlet_bridge, in_process
from gw_celery.transport import result_writer
from tests.unit.runtime.tracers import DEADLINE, Around, Reports, an_input, stepped


@pytest.fixture
def installed_later() -> Iterator[None]:
    """Celery 5.7 remembers which packages have backends."""
    forget = getattr(imports.load_extension_class_names, "cache_clear", lambda: None)
    forget()
    yield
    forget()


# -- every backend --


@pytest.fixture
def cache(celery_app: Celery, around: Around) -> CacheBackend:
    """Celery's memory backend, its writes taken off the loop."""
    made = result_backends.off_loop(CacheBackend, greenlet_bridge.Offload("store", 2, around))
    assert (made.__name__, issubclass(made, CacheBackend)) == ("CacheBackend", True)
    return made(app=celery_app, url="memory://")


@pytest.mark.parametrize(
    ("write", "state"),
    [
        (lambda backend: backend.mark_as_started("id-1", pid=1), states.STARTED),
        (lambda backend: backend.mark_as_done("id-1", "answer"), states.SUCCESS),
        (lambda backend: backend.mark_as_failure("id-1", ValueError("x")), states.FAILURE),
        (lambda backend: backend.mark_as_retry("id-1", ValueError("x")), states.RETRY),
        (lambda backend: backend.store_result("id-1", {"done": 1}, "PROGRESS"), "PROGRESS"),
    ],
    ids=["started", "done", "failure", "retry", "progress"],
)
@pytest.mark.parametrize("is_stepped", [True, False])
def test_every_write_is_stored_and_from_a_tracer_in_a_thread(
    cache: CacheBackend,
    around: Around,
    write: Callable[[Any], Any],
    state: str,
    is_stepped: bool,
) -> None:
    cache.forget("id-1")
    if is_stepped:
        stepped(lambda: write(cache))
        assert len(around.threads) == 1, "what a write writes besides stays in its thread"
        assert around.threads[0].startswith("gw-store")
    else:
        write(cache)
        assert around.threads == []
    assert cache.get_state("id-1") == state


def test_a_look_at_a_result_is_taken_from_a_thread(cache: CacheBackend, around: Around) -> None:
    # As the tracer does for worker_deduplicate_successful_tasks: Django refuses it on a loop.
    cache.store_result("looked at", 25, states.SUCCESS)
    assert stepped(lambda: cache.get_task_meta("looked at"))["result"] == 25
    assert [name.rpartition("_")[0] for name in around.threads] == ["gw-store"]


def test_a_result_that_cannot_be_stored_is_the_tracers_to_handle(cache: CacheBackend) -> None:
    with pytest.raises(Exception, match=r"lambda|function"):
        stepped(lambda: cache.mark_as_done("id-1", lambda: None))


@pytest.mark.parametrize("is_stepped", [True, False])
def test_what_the_input_of_a_benchmark_says_of_itself_goes_nowhere(
    cache: CacheBackend, is_stepped: bool
) -> None:
    cache.forget("unseen")
    input = replica_input.Input(0, "t", "unseen", link=None)

    def body() -> None:
        replica_input.current.set(input)
        cache.store_result("unseen", {"done": 1}, "PROGRESS")
        cache.mark_as_failure("unseen", ValueError("x"))
        assert cache.get_task_meta("unseen")["status"] == states.PENDING

    apart = contextvars.copy_context().run
    apart(stepped, body) if is_stepped else apart(body)
    assert cache.get_state("unseen") == states.PENDING


# -- install --


def test_an_app_stores_off_the_loop_and_answers_as_before(
    celery_app: Celery, around: Around
) -> None:
    result_backends.install(celery_app, around, 5, Reports())
    stepped(lambda: celery_app.backend.mark_as_done("id-2", "answer"))
    assert [name.startswith("gw-store") for name in around.threads] == [True]
    client = Celery("client", backend="cache+memory://", set_as_current=False)
    client.conf.accept_content = celery_app.conf.accept_content
    assert client.AsyncResult("id-2").state == states.SUCCESS
    assert celery_app.AsyncResult("id-2").get(timeout=DEADLINE) == "answer"


def test_the_address_of_the_server_stays(around: Around) -> None:
    app = Celery("proj", backend="redis://:secret@db.example:6390/7", set_as_current=False)
    result_backends.install(app, around, 5, Reports())
    assert isinstance(app.backend, RedisBackend)
    assert app.backend.connparams["host"] == "db.example"
    assert (app.backend.connparams["port"], app.backend.connparams["db"]) == (6390, 7)
    assert type(app.backend).__name__ == "RedisBackend"


@pytest.mark.parametrize("backend", [None, "disabled://"])
def test_an_app_without_results_needs_none(backend: str | None, around: Around) -> None:
    app = Celery("proj", backend=backend, set_as_current=False)
    result_backends.install(app, around, 5, Reports())
    stepped(lambda: app.backend.mark_as_done("id-1", "answer"))
    assert isinstance(app.backend, DisabledBackend)


@pytest.mark.usefixtures("installed_later")
def test_a_backend_of_another_package_stores_off_the_loop_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: Around
) -> None:
    """As django-celery-results has its own: Celery lets its name win over every override."""
    module = "from celery.backends.cache import CacheBackend\nclass Ours(CacheBackend): ...\n"
    (tmp_path / "gw_test_results.py").write_text(module)
    (tmp_path / "gw_test_results-1.dist-info").mkdir()
    (tmp_path / "gw_test_results-1.dist-info" / "METADATA").write_text("Name: gw_test_results\n")
    (tmp_path / "gw_test_results-1.dist-info" / "entry_points.txt").write_text(
        "[celery.result_backends]\ngw-test = gw_test_results:Ours\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = Celery("proj", backend="gw-test", set_as_current=False)
    app.conf.cache_backend = "memory"
    result_backends.install(app, around, 5, Reports())
    stepped(lambda: app.backend.mark_as_done("id-1", "answer"))
    assert [name.startswith("gw-store") for name in around.threads] == [True]


# -- Redis --


class Writer:
    """Notes the commands that go to Redis from the loop."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []
        self.raises: Exception | None = None

    async def run(self, *command: Any) -> Any:
        self.commands.append(command)
        await asyncio.sleep(0)
        if self.raises is not None:
            raise self.raises
        return None


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    made = Writer()
    monkeypatch.setattr(result_writer, "of", lambda *_: made)
    return made


@pytest.fixture
def redis_backend(around: Around, writer: Writer) -> Any:
    app = Celery("proj", backend="redis://db.example:1", set_as_current=False)
    app.conf.result_expires = 60
    result_backends.install(app, around, 5, Reports())
    return app.backend


def test_a_result_goes_to_redis_from_the_loop_after_a_look_at_what_is_stored(
    redis_backend: Any, writer: Writer, around: Around
) -> None:
    stepped(lambda: redis_backend.mark_as_done("id-1", "answer"))
    (get, key), (set_, same, value, lifetime) = writer.commands
    assert (get, set_, lifetime) == ("get", "set", 60)
    assert key == same == redis_backend.get_key_for_task("id-1")
    assert redis_backend.decode(value)["result"] == "answer"
    assert around.threads == []


def test_what_was_given_up_is_not_stored_as_a_failure_of_the_task(
    redis_backend: Any, writer: Writer
) -> None:
    """The tracer would, with time of its own, and the input would not run again."""

    def trace() -> None:
        replica_input.current.set(an_input())
        writer.raises = redis.exceptions.ConnectionError("away for long")
        with pytest.raises(redis.exceptions.ConnectionError):
            redis_backend.set("key", "SUCCESS")
        writer.raises = None
        with pytest.raises(redis.exceptions.ConnectionError, match="away for long"):
            redis_backend.set("key", "FAILURE")

    stepped(trace)
    assert [command[2] for command in writer.commands] == ["SUCCESS"]


def test_a_failure_is_stored_from_a_thread_where_errbacks_may_block(
    redis_backend: Any, around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    monkeypatch.setattr(redis_backend, "_store_result", lambda *_, **__: stored.append("stored"))
    stepped(lambda: redis_backend.mark_as_failure("id-1", ValueError("x")))
    assert stored == ["stored"]
    assert [name.startswith("gw-store") for name in around.threads] == [True]


def test_a_part_of_a_chord_is_counted_in_a_thread(
    redis_backend: Any, around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    monkeypatch.setattr(redis_backend, "_store_result", lambda *_, **__: None)
    monkeypatch.setattr(
        RedisBackend,
        "on_chord_part_return",
        lambda *_, **__: counted.append(threading.current_thread().name),
    )
    request = types.SimpleNamespace(chord={"task": "t"}, group="g", ignore_result=False)
    stepped(lambda: redis_backend.mark_as_done("id-1", "answer", request))
    assert [name.startswith("gw-store") for name in counted] == [True]
    assert len(around.threads) == 1


def test_a_thread_of_a_process_that_serves_stores_from_its_loop(
    redis_backend: Any, writer: Writer
) -> None:
    serving = in_process.Process(conf.read(redis_backend.app.conf))
    serving.start()
    execution.install(serving)
    redis_backend.mark_as_done("id-1", "answer")
    assert [command[0] for command in writer.commands] == ["get", "set"]


def test_a_lifetime_of_its_own_is_kept(redis_backend: Any, writer: Writer) -> None:
    stepped(lambda: redis_backend.set("key", "value", expires=5))
    stepped(lambda: redis_backend.set("key", "value", expires=0))
    assert [command[3] for command in writer.commands] == [5, 0]


def test_what_celery_takes_by_name_is_taken(redis_backend: Any, writer: Writer) -> None:
    stepped(
        lambda: redis_backend.mark_as_done(
            task_id="id-1", result="answer", request=None, store_result=True, state="DONE"
        )
    )
    assert redis_backend.decode(writer.commands[-1][2])["status"] == "DONE"


def test_a_result_too_large_for_redis_fails_alone(redis_backend: Any, writer: Writer) -> None:
    """Redis would close the connection, and its group would be tried again until the limit."""
    redis_backend._MAX_STR_VALUE_SIZE = 10
    with pytest.raises(BackendStoreError, match="too large"):
        stepped(lambda: redis_backend.set("key", "x" * 11))
    assert writer.commands == []


class Base56:
    """The write of Celery 5.6, which knows no lifetime of its own."""

    expires = 60

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def set(self, key: str, value: str, **retry_policy: Any) -> None:
        self.seen.append((key, value, retry_policy))

    def get(self, key: str) -> str:
        return "value of " + key


def test_elsewhere_the_backend_writes_and_reads_as_its_celery_does() -> None:
    made = result_backends.grouped(Base56, 5, Reports())()
    made.set("key", "value", max_retries=1)
    assert made.seen == [("key", "value", {"max_retries": 1})]
    assert made.get("key") == "value of key"
