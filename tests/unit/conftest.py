"""What unit tests share: Celery apps that no broker, and no other test, knows of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import redis
from celery import Celery, _state
from kombu.asynchronous import Hub, get_event_loop, set_event_loop
from kombu.transport import memory

import gw_celery as gw
from gw_celery import testing
from gw_celery.client import execution


@pytest.fixture
def celery_app() -> Celery:
    made = Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    gw.preset(made)
    return made


@pytest.fixture
def app(celery_app: Celery) -> gw.App:
    """An App that is bound to a Celery app of its own."""
    return gw.App("unit", celery=celery_app)


@pytest.fixture
def serve(app: gw.App) -> Iterator[Callable[[], None]]:
    """A function that enters what ``app`` has declared, until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(testing.in_process(app))


@pytest.fixture(autouse=True)
def _gpus_of_the_shell_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GW_FAKE_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _tasks_stay_in_their_test() -> Iterator[None]:
    """Celery gives every task to every app of the process that is finalized later."""
    before = set(_state._on_app_finalizers)
    yield
    _state._on_app_finalizers.intersection_update(before)


@pytest.fixture(autouse=True)
def _messages_stay_in_their_test() -> Iterator[None]:
    """Every ``memory://`` of a process is the same broker."""
    yield
    for queue in memory.Channel.queues.values():
        queue.queue.clear()


@pytest.fixture(autouse=True)
def _every_runtime_is_stopped() -> Iterator[None]:
    yield
    left = execution.current()
    if left is not None:
        execution.install(None)
        left.stop()


@pytest.fixture
def server(redis_server: testing.Server, redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        yield client
        client.acl_setuser("default", enabled=True, categories=["+@all"])
        client.config_set("maxmemory", 0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An event loop that this process has, as a worker's main process does."""
    before, made = get_event_loop(), Hub()
    set_event_loop(made)
    yield made
    set_event_loop(before)
    made.close()
