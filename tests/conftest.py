"""Fixtures that tests of several folders share.

A service that is missing skips the test, and fails it where ``CI`` is set. For workers that one
module shares, use ``processes.workers`` with ``redis_server`` in a fixture of that module.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

from tests import processes, services

if TYPE_CHECKING:
    from pathlib import Path

    from gw_celery import testing
    from tests.pooling import StartPooled

T = TypeVar("T")

#: Files that would keep one process busy after the others have run out of files: they come first.
LONGEST = ("tests/integration/test_stock_pools.py", "tests/integration/test_autoscaling.py")
#: Files whose tests share one example project, which runs five processes, torch in one of them.
PROJECT_TESTS = tuple(
    f"tests/acceptance/test_{name}.py" for name in ("batches", "search_api", "search_page")
)

pytest_plugins = ["gw_celery.testing.fixtures"]


def missing(why: object) -> NoReturn:
    """Skip for a service that is not here; in CI that is a failure."""
    if services.IN_CI:
        pytest.fail(f"{why} (required in CI)", pytrace=False)
    pytest.skip(str(why))


def pytest_configure() -> None:
    # The background job of a script ignores Ctrl-C, and so would every process started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and those of the example project to the same."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return PROJECT_TESTS[0] if file in PROJECT_TESTS else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> testing.Server:
    """The embedded server of this test run, where there is a program for it."""
    from gw_celery import errors

    try:
        server: testing.Server = request.getfixturevalue("gw_server")
    except errors.ServerNotFound as error:
        missing(error)
    return server


@pytest.fixture
def redis_url(redis_server: testing.Server, gw_broker: testing.Server) -> str:
    """The broker URL of ``gw_broker``."""
    return gw_broker.broker_url


@pytest.fixture
def result_url(redis_url: str, redis_server: testing.Server) -> str:
    return redis_server.result_url


@contextmanager
def needed(service: AbstractContextManager[T]) -> Iterator[T]:
    with ExitStack() as stack:
        try:
            given = stack.enter_context(service)
        except services.Missing as why:
            missing(why)
        yield given


@pytest.fixture(scope="session")
def redis_tcp_urls() -> Iterator[tuple[str, str]]:
    """Broker and result URL of two empty databases of the Redis on 127.0.0.1:6379."""
    with needed(services.redis_on_tcp()) as urls:
        yield urls


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """A virtual host of this test run alone on the RabbitMQ on 127.0.0.1:5672."""
    with needed(services.rabbitmq_vhost()) as url:
        yield url


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """The broker of a test that runs once on each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def start_worker(
    redis_url: str, result_url: str, tmp_path: Path
) -> Iterator[processes.StartWorker]:
    """Start ``celery -A <module> worker``: see ``processes.StartWorker``; stopped at the end."""
    with processes.workers(tmp_path, redis_url, result_url) as start:
        yield start


@pytest.fixture
def ledger_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which the test apps write what they do, in whatever process."""
    path = tmp_path / "ledger"
    monkeypatch.setenv("LEDGER", str(path))
    return path


@pytest.fixture
def start_pooled(start_worker: processes.StartWorker, ledger_path: Path) -> StartPooled:
    """Start a worker on the GPU pool: see ``pooling.start``; stopped at the end."""
    # The app that it serves is imported where it is needed.
    from tests import pooling

    return functools.partial(pooling.start, start_worker, ledger_path)


@pytest.fixture(scope="module")
def pooled_worker(
    redis_server: testing.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[processes.WorkerProcess]:
    """A worker on the GPU pool that all tests of a module share."""
    from tests import pooling

    with pooling.module_worker(redis_server, tmp_path_factory) as worker:
        yield worker


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright's sync API.

    For a module at a time: while it is open, its event loop runs in this thread and
    ``asyncio.run`` of another test would fail.
    """
    from playwright.sync_api import sync_playwright

    try:
        path = services.chromium()
    except services.Missing as why:
        missing(why)
    with sync_playwright() as playwright:
        # Root (a container) has no user namespace for the sandbox; nothing here leaves the host.
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        yield playwright.chromium.launch(executable_path=path, args=flags)
