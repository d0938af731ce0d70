from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
from celery import Celery, _state
from celery.exceptions import QueueNotFound

import gw_celery as gw

PROBE = "gw_celery.probe_sweep"
BENCHMARK = "gw_celery.benchmark_sweep"
COMMANDS = {PROBE: "gw_probe_tick", BENCHMARK: "gw_benchmark_tick"}
BOTH = [BENCHMARK, PROBE]


def probed(app: gw.App, name: str = "Probed", period: float = 30.0) -> None:
    methods = {"__module__": __name__, "check": gw.method()(check)}
    app.cls(probes=[gw.Probe.on("check", period_s=period)])(type(name, (), methods))


def measured(app: gw.App, **options: Any) -> None:
    app.remote(benchmark_dataset=[{"x": 1}], **options)(measure)


def check(self) -> bool: ...


async def measure(x): ...


def ours(celery_app: Celery) -> list[str]:
    return sorted(name for name in celery_app.conf.beat_schedule if name.startswith("gw_celery."))


def test_an_entry_is_a_task_and_whole_seconds(app: gw.App) -> None:
    probed(app)
    measured(app)
    app.celery.finalize()
    schedule = app.celery.conf.beat_schedule
    assert schedule == {
        "gw_celery.probe_sweep": {"task": "gw_celery.probe_sweep", "schedule": 10},
        "gw_celery.benchmark_sweep": {"task": "gw_celery.benchmark_sweep", "schedule": 86_400},
    }
    assert {type(entry["schedule"]) for entry in schedule.values()} == {int}


@pytest.mark.parametrize("name", BOTH)
def test_a_message_names_the_queue_and_when_it_expires(app: gw.App, name: str) -> None:
    probed(app)
    measured(app)
    app.celery.finalize()
    app.celery.tasks[name].apply_async()
    with app.celery.connection_for_read() as connection:
        message = connection.SimpleQueue("gw.control").get(timeout=5)
    period = app.celery.conf.beat_schedule[name]["schedule"]
    expires = dt.datetime.fromisoformat(message.headers["expires"]) - dt.datetime.now(dt.UTC)
    assert period - 5 < expires.total_seconds() <= period
    assert message.properties["expiration"] == str(period * 1000)
    assert message.headers["ignore_result"]


@pytest.mark.parametrize(
    ("declare", "expected"),
    [
        (lambda app: None, []),
        (lambda app: app.remote(check_nothing), []),
        (probed, [PROBE]),
        (measured, [BENCHMARK]),
    ],
)
def test_there_is_an_entry_only_for_what_is_declared(
    app: gw.App, declare: Callable[[gw.App], None], expected: list[str]
) -> None:
    declare(app)
    app.celery.finalize()
    assert ours(app.celery) == expected


async def check_nothing(x): ...


@pytest.mark.parametrize("moment", ["before", "configured", "finalized"])
def test_the_entries_are_there_whenever_something_is_declared(app: gw.App, moment: str) -> None:
    if moment == "configured":
        assert app.celery.conf.timezone is None
    if moment == "finalized":
        app.celery.finalize()
    probed(app)
    measured(app)
    app.celery.finalize()
    assert ours(app.celery) == BOTH


@pytest.fixture
def current() -> Iterator[Celery]:
    """A Celery app that lazy Apps bind to, and that no later test finds."""
    before = _state._tls.current_app, _state.default_app
    with Celery("current", broker="memory://", backend="cache+memory://") as made:
        made.set_current()
        yield made
    _state._tls.current_app, _state.default_app = before


@pytest.mark.parametrize("is_finalized", [False, True])
def test_a_lazily_bound_app_gives_them_to_the_app_in_use(
    current: Celery, is_finalized: bool
) -> None:
    if is_finalized:
        current.finalize()
    lazy = gw.App("lazy")
    # Names of their own: they go to the apps of other tests, too, while those live.
    probed(lazy, f"Lazy{is_finalized}")
    measured(lazy, name=f"lazy.{is_finalized}", queue=f"lazy{is_finalized}")
    current.finalize()
    assert ours(current) == BOTH
    assert set(COMMANDS) <= set(current.tasks)


def test_several_apps_of_one_celery_app_share_the_tasks_and_the_entries(
    celery_app: Celery, recwarn: pytest.WarningsRecorder
) -> None:
    first, second = gw.App("first", celery_app), gw.App("second", celery_app)
    probed(first, "Slow", 30.0)
    celery_app.finalize()
    assert celery_app.conf.beat_schedule[PROBE]["schedule"] == 10
    probed(second, "Quick", 3.0)
    measured(second)
    assert ours(celery_app) == BOTH
    assert celery_app.conf.beat_schedule[PROBE]["schedule"] == 3
    assert sorted(name for name in celery_app.tasks if name.startswith("gw_celery.")) == BOTH
    assert celery_app.tasks[PROBE].expires == 3


def test_what_the_user_schedules_stays_and_wins(app: gw.App) -> None:
    mail = {"task": "mail", "schedule": 60.0}
    own = {"task": PROBE, "schedule": 7.0}
    given = {"mail": mail, PROBE: own}
    app.celery.conf.beat_schedule = given
    probed(app)
    measured(app)
    app.celery.finalize()
    measured_too(app)
    schedule = app.celery.conf.beat_schedule
    assert sorted(schedule) == [*BOTH, "mail"]
    assert (schedule["mail"], schedule[PROBE]) == (mail, own)
    assert sorted(given) == [PROBE, "mail"], "a project's own dict is not written to"


def measured_too(app: gw.App) -> None:
    app.remote(benchmark_dataset=[{"x": 1}], queue="other")(check_nothing)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gw_probe_period": None}, [BENCHMARK]),
        ({"gw_benchmark_period": None}, [PROBE]),
        ({"gw_benchmark_period": None, "gw_probe_period": None}, []),
    ],
)
def test_a_setting_switches_an_entry_off(
    app: gw.App, settings: dict[str, Any], expected: list[str]
) -> None:
    app.celery.conf.update(settings)
    probed(app)
    measured(app)
    app.celery.finalize()
    assert ours(app.celery) == expected


@pytest.mark.parametrize(
    ("longest", "declared", "period"),
    [(10.0, 30.0, 10), (10.0, 2.9, 2), (10.0, 0.1, 1), (0.5, 30.0, 1)],
)
def test_the_quickest_probe_sets_the_period_within_bounds(
    app: gw.App, longest: float, declared: float, period: int
) -> None:
    app.celery.conf.gw_probe_period = longest
    probed(app, period=declared)
    app.celery.finalize()
    assert app.celery.conf.beat_schedule[PROBE]["schedule"] == period


def test_a_setting_of_a_wrong_type_is_logged_and_breaks_nothing(
    app: gw.App, caplog: pytest.LogCaptureFixture
) -> None:
    app.celery.conf.gw_probe_period = "10 s"
    probed(app)
    app.celery.finalize()
    assert "app.conf.gw_probe_period='10 s': must be" in caplog.text
    assert ours(app.celery) == []


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_sweep_broadcasts_its_command_and_waits_for_no_reply(
    app: gw.App, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    control = app.celery.control
    monkeypatch.setattr(control, "broadcast", lambda *args, **options: told.append((args, options)))
    task = app.celery.tasks[name]
    assert task.apply().successful()
    assert told == [((command,), {"reply": False})]
    assert task.ignore_result


def test_a_project_whose_tasks_derive_from_a_class_of_its_own_has_plain_sweeps() -> None:
    class Audited(gw_task()):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise PermissionError("no user")

    celery_app = Celery("audited", broker="memory://", task_cls=Audited, set_as_current=False)
    gw.App("audited", celery_app)
    assert not isinstance(celery_app.tasks[PROBE], Audited)


def gw_task() -> type:
    from celery import Task

    return Task


def test_the_queue_is_the_same_in_every_process_whatever_queues_the_app_makes(app: gw.App) -> None:
    app.celery.conf.update(
        task_queue_max_priority=10,
        task_create_missing_queue_type="quorum",
        task_create_missing_queue_exchange_type="topic",
    )
    queues = app.celery.amqp.queues
    assert queues["other"].queue_arguments == {"x-queue-type": "quorum", "x-max-priority": 10}
    app.celery.tasks[PROBE].apply_async()
    queue = queues["gw.control"]
    assert (queue.queue_arguments, queue.durable, queue.routing_key) == (None, True, "gw.control")
    assert (queue.exchange.name, queue.exchange.type) == ("gw.control", "direct")


def test_a_queue_that_the_project_names_is_the_projects(app: gw.App) -> None:
    named = kombu.Queue("gw.control", queue_arguments={"x-max-length": 9})
    app.celery.conf.task_queues = [named]
    app.celery.tasks[PROBE].apply_async()
    assert app.celery.amqp.queues["gw.control"].queue_arguments == {"x-max-length": 9}


def test_a_project_that_makes_no_queues_by_itself_gets_none(app: gw.App) -> None:
    app.celery.conf.update(task_create_missing_queues=False, task_queues=[kombu.Queue("other")])
    with pytest.raises(QueueNotFound):
        app.celery.tasks[PROBE].apply_async()
