"""The doubles of ``gw_celery.testing`` as pytest fixtures::

    pytest_plugins = ["gw_celery.testing.fixtures"]

A test that fails shows the ends of the logs of the processes that run at that time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gw_celery import devserver
from gw_celery.app import App
from gw_celery.testing import workers
from gw_celery.testing.serving import FakeClock, in_process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for process in workers.running:
            report.sections.append((f"log of {process}", process.log_tail()))
    return report


@pytest.fixture
def gw_clock() -> FakeClock:
    """The clock of batches under ``gw_in_process`` in this test: it stands still."""
    return FakeClock()


@pytest.fixture
def gw_in_process(request: pytest.FixtureRequest) -> Iterator[Callable[[App], Any]]:
    """Return a function that serves an App in this process until the test ends.

    A test that uses the fixture ``gw_clock`` as well has its batches wait by that clock.
    """
    clock = request.getfixturevalue("gw_clock") if "gw_clock" in request.fixturenames else None
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(in_process(app, clock=clock))


@pytest.fixture
def gw_fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that gives workers of this test the GPUs that it names: ``A100:4``."""
    return functools.partial(monkeypatch.setenv, "GW_FAKE_GPUS")


@pytest.fixture(scope="session")
def gw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[devserver.Server]:
    """An embedded server of this test run alone."""
    with devserver.running(tmp_path_factory.mktemp("gw_server")) as server:
        yield server
        workers.close_all()
        # A result unsubscribes when it is collected: it needs the server once more.
        gc.collect()


@pytest.fixture
def gw_broker(gw_server: devserver.Server) -> Iterator[devserver.Server]:
    """``gw_server``, emptied for the test; Celery apps of this process use it meanwhile.

    It takes precedence over the URLs of their own configuration.
    """
    with redis.Redis(unix_socket_path=str(gw_server.socket)) as client:
        client.flushall()
    with workers.talking_to(gw_server):
        yield gw_server


@pytest.fixture
def gw_worker(
    gw_broker: devserver.Server, tmp_path: Path
) -> Iterator[Callable[..., workers.Worker]]:
    """Return a function that starts a worker, as ``gw_celery.testing.worker``, for this test."""
    with contextlib.ExitStack() as stack:
        start = functools.partial(workers.worker, server=gw_broker, log_dir=tmp_path)
        yield lambda *args, **kwargs: stack.enter_context(start(*args, **kwargs))
