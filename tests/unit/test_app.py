"""What an App makes of declarations as Celery tasks: their base class, their app, their queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery import Celery, _state

import gw_celery as gw
from gw_celery import testing
from tests.unit.refusals import refused


class Audited(celery.Task):
    """What a project derives its tasks from."""

    autoretry_for = (KeyError,)
    default_retry_delay = 0

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        seen.append(f"{self.name} begins")

    def audit(self) -> str:
        return f"audited {self.name}"


class Called(celery.Task):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class Weights:
    def __enter__(self): ...
    def __exit__(self, *exc): ...


seen: list[str] = []


async def square(x):
    return x * x


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


def made(name: str, **given: Any) -> Celery:
    return Celery(name, broker="memory://", set_as_current=False, **given)


@pytest.fixture
def current() -> Iterator[Any]:
    """A function that makes a Celery app the current one until the test ends."""
    before = _state._tls.current_app
    yield lambda app: app.set_current() or app
    _state._tls.current_app = before


@pytest.fixture
def lazy(current) -> gw.App:
    current(made("empty"))
    return gw.App("lazy")


@pytest.mark.parametrize("name", ["", " ", 5, None, made("not a name")])
def test_an_app_without_a_name_is_refused(name: object) -> None:
    error = refused(gw.App, name)

    assert error.argument == "name"
    assert error.value is name
    assert 'write gw.App("search", celery_app)' in error.rule


@pytest.mark.parametrize("value", [5, "proj", Celery])
def test_an_app_of_what_is_no_celery_app_is_refused(value: object) -> None:
    error = refused(gw.App, "unit", value)

    assert (error.argument, error.value) == ("celery", value)
    assert "must be a Celery app" in error.rule


def test_an_app_of_the_current_app_stays_with_it(current) -> None:
    first = current(made("first"))
    app = gw.App("unit", celery.current_app)
    current(made("second"))

    assert app.celery is first


def test_a_base_of_the_users_keeps_its_methods_and_runs_its_hooks(app, serve) -> None:
    task = app.remote(base=Audited)(square)

    serve()
    assert isinstance(task, Audited)
    assert task.audit() == f"audited {task.name}"
    assert task.remote(5) == 25
    assert seen == [f"{task.name} begins"]


def test_a_base_keeps_private_attributes_whose_names_are_likely(app, serve) -> None:
    class Own(celery.Task):
        _options = _timeout = task = "the user's"

    task = app.remote(base=Own)(square)

    serve()
    assert (task._options, task._timeout, task.task) == ("the user's",) * 3
    assert task.remote(5) == 25


def test_a_method_has_a_base_of_the_users_too(app, serve) -> None:
    @app.cls
    class Model:
        tries = 0

        @gw.method(base=Audited)
        def predict(self, x):
            Model.tries += 1
            if Model.tries < 2:
                raise KeyError(x)
            return x

    serve()
    assert Model().predict.remote(3) == 3
    assert seen == [f"{__name__}.Model.predict begins"] * 2


def test_a_base_replaces_that_of_the_celery_app_as_in_celery() -> None:
    task = gw.App("unit", made("based", task_cls=Audited)).remote(base=celery.Task)(square)

    assert not isinstance(task, Audited)
    assert callable(task.remote)


@pytest.mark.parametrize("base", [None, int, "celery:Task", Audited()])
def test_a_base_that_is_no_task_class_is_refused(app: gw.App, base: object) -> None:
    error = refused(app.remote(base=base), square)

    assert error.argument == "base"
    assert error.value is base
    assert "subclass of celery.Task" in error.rule


def test_a_base_whose_call_would_not_be_made_is_refused(app: gw.App) -> None:
    error = refused(app.remote(base=Called), square)

    assert (error.argument, error.value) == ("base", Called)
    assert "before_start" in error.rule


@pytest.mark.parametrize("is_early", [True, False])
def test_a_lazy_app_honours_the_base_class_of_each_celery_app(lazy, current, is_early) -> None:
    task = lazy.remote(square) if is_early else None
    audited = made("audited", task_cls=f"{__name__}:Audited")
    plain = made("plain")
    for one in (audited, plain):
        one.finalize()
    if task is None:
        task = lazy.remote(square)

    current(plain)
    assert not isinstance(task, Audited)
    assert task.app is plain
    current(audited)
    assert task.audit() == f"audited {__name__}.square"
    with testing.in_process(lazy):
        assert task.remote(5) == 25
    assert seen == [f"{__name__}.square begins"]


def test_a_lazy_app_honours_a_base_of_the_users(lazy, current) -> None:
    task = lazy.remote(base=Audited)(square)
    current(made("plain"))

    assert task.audit() == f"audited {__name__}.square"


def test_two_apps_of_one_celery_app_have_no_task_of_the_same_name(celery_app) -> None:
    first, second = gw.App("first", celery_app), gw.App("second", celery_app)
    first.remote(square)
    error = refused(second.remote, square)

    assert (error.argument, error.value) == ("name", f"{__name__}.square")
    assert f"a task of {__name__}.square in App('first') already" in error.rule
    assert second.remote(name="another")(square).name == "another"


def test_two_apps_of_one_celery_app_have_no_context_in_common(celery_app) -> None:
    first, second = gw.App("first", celery_app), gw.App("second", celery_app)
    first.context()(Weights)
    error = refused(second.context(), Weights)

    assert (error.argument, error.value) == ("context", f"{__name__}.Weights")
    assert "registered already in App('first')" in error.rule


def test_apps_of_two_celery_apps_may_use_the_same_names() -> None:
    for name in ("one", "two"):
        app = gw.App("search", made(name))
        app.context()(Weights)
        assert app.remote(square).name == f"{__name__}.square"


def test_a_lazy_app_with_a_task_of_another_is_refused_when_it_is_bound(lazy, celery_app) -> None:
    gw.App("bound", celery_app).remote(square)
    lazy.remote(square)
    error = refused(celery_app.finalize)

    assert (error.argument, error.value) == ("name", f"{__name__}.square")
    assert "in App('bound') already" in error.rule


def test_a_lazy_app_is_refused_at_once_where_the_app_in_use_has_its_task(
    lazy, current, celery_app
) -> None:
    gw.App("bound", celery_app).remote(square)
    current(celery_app).finalize()
    error = refused(lazy.remote, square)

    assert (error.argument, error.value) == ("name", f"{__name__}.square")
    assert "in App('bound') already" in error.rule


def test_a_celery_app_that_is_not_in_use_keeps_the_task_that_it_has(lazy, celery_app) -> None:
    bound = gw.App("bound", celery_app)
    bound.remote(square)
    celery_app.finalize()
    lazy.remote(square)

    assert celery_app.tasks[f"{__name__}.square"].gw_registry is bound.registry


def test_two_lazy_apps_with_the_same_context_are_refused_when_they_are_bound(lazy) -> None:
    other = gw.App("other")
    for app, name in ((lazy, "first"), (other, "second")):
        app.context()(Weights)
        app.remote(name=name)(square)
    error = refused(made("shared").finalize)

    assert (error.argument, error.value) == ("context", f"{__name__}.Weights")
    assert "App('lazy')" in error.rule
    assert "App('other')" in error.rule


def queue_of(task: Any, **options: Any) -> str:
    """The queue in which one message of ``task`` lies at the in-memory broker."""
    with task.app.connection_for_read() as connection:
        channel = connection.default_channel
        for left in channel.queues:  # by other tests: all share one broker
            channel._purge(left)
        task.apply_async((5,), **options)
        (name,) = [name for name in channel.queues if channel._size(name)]
    return name


@pytest.mark.parametrize(
    "routes",
    [
        {f"{__name__}.square": {"priority": 3}},
        {f"{__name__}.*": {"priority": 3, "queue": None}},
        ([(f"{__name__}.*", {"compression": "zlib"})],),
        lambda name, args, kwargs, options, task=None, **_: {"delivery_mode": 1},
        lambda name, args, kwargs, options, task=None, **_: None,
    ],
)
def test_a_route_that_names_no_queue_leaves_the_services_own(app: gw.App, routes: Any) -> None:
    app.celery.conf.task_routes = routes
    task = app.remote(gpu=gw.Gpu("A100"))(square)

    assert queue_of(task) == "gpu.A100.square"
    assert queue_of(task, priority=5) == "gpu.A100.square"


@pytest.mark.parametrize("routes", [{f"{__name__}.*": "vip"}, {"*": {"queue": "vip"}}])
def test_a_route_that_names_a_queue_wins(app: gw.App, routes: Any) -> None:
    app.celery.conf.task_routes = routes

    assert queue_of(app.remote(gpu=gw.Gpu("A100"))(square)) == "vip"


def test_celery_is_told_when_it_takes_this_app_for_its_own() -> None:
    app = gw.App("search", Celery("proj", set_as_current=False))
    with pytest.raises(gw.UsageError, match="celery -A proj:celery"):
        _ = app.user_options


def test_two_celery_apps_with_tasks_of_one_name_each_keep_their_own() -> None:
    made = [Celery(f"app{number}", set_as_current=False) for number in range(2)]
    declared = [gw.App(f"of {one.main}", one) for one in made]
    # Celery runs the finalizers in no certain order: with one name it would be right at times.
    names = [f"proj.embed{number}" for number in range(20)]
    for app in declared:
        for name in names:

            async def embed(x): ...

            embed.__qualname__ = name
            app.remote(name=name, queue="many")(embed)
    for one in made:
        one.finalize()
    for app, one in zip(declared, made, strict=True):
        assert all(one.tasks[name].gw_registry is app.registry for name in names)
