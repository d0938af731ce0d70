"""The doubles of ``gw_celery.testing`` as pytest fixtures, for the process of the tests::

    pytest_plugins = ["gw_celery.testing.fixtures"]

The report of a failed test shows the ends of the logs of running processes.
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
    """The clock of the batches under ``gw_in_process``; only ``advance`` moves it."""
    return FakeClock()


@pytest.fixture
def gw_in_process(request: pytest.FixtureRequest) -> Iterator[Callable[[App], Any]]:
    """Return a function that serves an App in this process until the test ends.

    If the test also uses ``gw_clock``, its batches wait by that clock.
    """
    clock = request.getfixturevalue("gw_clock") if "gw_clock" in request.fixturenames else None
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(in_process(app, clock=clock))


@pytest.fixture
def gw_fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets the simulated GPUs of this test's workers, as ``A100:4``."""
    return functools.partial(monkeypatch.setenv, "GW_FAKE_GPUS")


@pytest.fixture(scope="session")
def gw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[devserver.Server]:
    """An embedded server for this test session."""
    with devserver.running(tmp_path_factory.mktemp("gw_server")) as server:
        yield server
        workers.close_all()
        # A result unsubscribes when it is garbage collected, and needs the server for that.
        gc.collect()


@pytest.fixture
def gw_broker(gw_server: devserver.Server) -> Iterator[devserver.Server]:
    """``gw_server``, emptied before the test; the Celery apps of this process use it.

    Its URLs override those of the apps' own configuration.
    """
    with redis.Redis(unix_socket_path=str(gw_server.socket)) as client:
        client.flushall()
    with workers.talking_to(gw_server):
        yield gw_server


@pytest.fixture
def gw_worker(
    gw_broker: devserver.Server, tmp_path: Path
) -> Iterator[Callable[..., workers.Worker]]:
    """Return a function like ``gw_celery.testing.worker``; its workers end with the test."""
    with contextlib.ExitStack() as stack:
        start = functools.partial(workers.worker, server=gw_broker, log_dir=tmp_path)
        yield lambda *args, **kwargs: stack.enter_context(start(*args, **kwargs))
