from __future__ import annotations

import asyncio
import os
import threading

import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import errors, testing


def app_with(name: str, log: list[str]) -> gw.App:
    app = gw.App(name, celery=Celery(name, broker="memory://", set_as_current=False))

    class Weights:
        def __enter__(self):
            log.append(f"enter {name}")

        def __exit__(self, *exc):
            log.append(f"leave {name}")

    async def body(): ...

    Weights.__qualname__, body.__qualname__ = f"{name}.Weights", f"{name}.body"
    app.context()(Weights)
    app.remote(name=f"{name}.body")(body)
    return app


def require_left(app: gw.App) -> None:
    """Check that nothing serves the only context of ``app`` in this process any more."""
    (context,) = app.registry.contexts.values()
    with pytest.raises(errors.ContextLookupError, match="this is not a GPU worker"):
        app.get_context(context.cls)


def test_everything_is_entered_for_the_block_and_left_after_it() -> None:
    log: list[str] = []
    app = app_with("first", log)

    for _ in range(2):
        with testing.in_process(app):
            assert log == ["enter first"]
            assert app.celery.conf.task_always_eager
        assert log == ["enter first", "leave first"]
        log.clear()
    assert not app.celery.conf.task_always_eager
    require_left(app)
    assert not [one for one in threading.enumerate() if one.name == "gw-loop"]


def test_an_inner_block_leaves_the_outer_one_alone() -> None:
    log: list[str] = []
    outer, inner = app_with("outer", log), app_with("inner", log)

    with testing.in_process(outer):
        with testing.in_process(inner):
            pass
        assert "leave outer" not in log
    assert sorted(log) == ["enter inner", "enter outer", "leave inner", "leave outer"]


def test_a_start_that_fails_raises_and_leaves_nothing_behind(app) -> None:
    @app.cls
    class Model:
        @gw.on_enter()
        def load(self):
            raise OSError("no weights")

        @gw.method()
        def predict(self): ...

    @app.context()
    class Weights:
        def __enter__(self): ...

        def __exit__(self, *exc): ...

    with pytest.raises(errors.StartupError, match="no weights"), testing.in_process(app):
        pass
    require_left(app)
    assert not app.celery.conf.task_always_eager


def test_the_fixture_serves_several_apps(gw_in_process) -> None:
    log: list[str] = []
    first, second = app_with("first", log), app_with("second", log)
    gw_in_process(first)
    gw_in_process(second)

    assert log == ["enter first", "enter second"]
    assert first.celery.tasks["first.body"].remote() is None
    assert second.celery.tasks["second.body"].remote() is None


def test_exit_hooks_of_class_tasks_may_use_contexts_which_leave_after_them(app: gw.App) -> None:
    seen: list[bool] = []

    @app.context()
    class Engine:
        is_open = False

        async def __aenter__(self) -> Engine:
            self.is_open = True
            return self

        async def __aexit__(self, *exc: object) -> None:
            self.is_open = False

    @app.cls
    class Model:
        size: int = gw.parameter(scope="load")

        @gw.on_enter()
        def load(self) -> None:
            self.engine = app.get_context(Engine)

        @gw.on_exit()
        async def unload(self) -> None:
            await asyncio.sleep(0.01)
            seen.append(self.engine.is_open)

        @gw.method()
        def predict(self) -> int:
            return self.size

    with testing.in_process(app):
        assert Model(size=2).predict.local() == 2
    assert seen == [True]


def test_workers_of_a_test_get_the_fake_gpus_that_it_names(gw_fake_gpus) -> None:
    gw_fake_gpus("A100:2")
    assert os.environ["GW_FAKE_GPUS"] == "A100:2"
