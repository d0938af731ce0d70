"""Test tasks without a broker: their contexts and classes are entered in the test's process.

With pytest::

    pytest_plugins = ["gw_celery.testing"]

    def test_square(gw_in_process):
        gw_in_process(app)
        assert square.remote(5) == 25
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gw_celery.calling import eager
from gw_celery.runtime import process

if TYPE_CHECKING:
    from gw_celery.app import App

try:
    import pytest
except ModuleNotFoundError:  # ``in_process`` serves other test runners, too
    pytest = None  # type: ignore[assignment]


@contextlib.contextmanager
def in_process(app: App) -> Iterator[None]:
    """Serve everything that ``app`` declares in this process, eagerly, until the block ends.

    Contexts and ``on_enter`` hooks are entered now and left at the end, of the outermost block
    where several Apps are served. Inside, ``.delay()``, ``.remote()``, ``await`` and canvas run
    the bodies here, through the same serializer.

    Raises:
        StartupError: when a context or hook fails, with every cause.
    """
    conf = app.celery.conf
    before = conf.task_always_eager
    is_outermost = process.current() is None
    runtime = eager.started(app.celery)
    conf.task_always_eager = True
    try:
        runtime.enter([app.registry], list(app.registry.services.values()))
        yield
    finally:
        conf.task_always_eager = before
        if is_outermost:
            eager.stop(runtime)


if pytest is not None:

    @pytest.fixture
    def gw_in_process() -> Iterator[Callable[[App], Any]]:
        """Return a function that serves an App in this process until the test ends."""
        with contextlib.ExitStack() as stack:
            yield lambda app: stack.enter_context(in_process(app))
