from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.bin import worker as stock
from click.testing import CliRunner, Result

from gw_celery import cli
from gw_celery.worker import options as worker_options
from gw_celery.worker.options import WorkerOptions


class App(Celery):
    """An app that notes with which options Celery would make its worker."""

    options: dict[str, Any] | None = None

    @property
    def Worker(self) -> Any:  # noqa: N802
        def make(**options: Any) -> Any:
            self.options = options
            return SimpleNamespace(start=lambda: None, exitcode=0)

        return make


@pytest.fixture
def made() -> App:
    return App("typed", broker="memory://", set_as_current=False)


def typed(made: App, line: str) -> Result:
    obj = SimpleNamespace(app=made, no_color=True, quiet=True)
    return CliRunner().invoke(cli.gw, ["worker", *line.split()], obj=obj)


def typed_options(made: App) -> WorkerOptions:
    assert made.options is not None
    options: WorkerOptions = made.options[worker_options.KEY]
    return options


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", WorkerOptions()),
        ("--gpu A100", WorkerOptions(gpu="A100")),
        ("--gpu CPU --replicas 2", WorkerOptions(gpu="CPU", replicas=2)),
        ("-Q gpu.A100.embed,celery -X celery", WorkerOptions(names_queues=True)),
    ],
)
def test_what_was_typed_reaches_the_worker(made: App, line: str, expected: WorkerOptions) -> None:
    result = typed(made, line)
    assert result.exit_code == 0, result.output
    assert typed_options(made) == expected


def test_the_pool_is_ours_for_this_worker_only(made: App) -> None:
    made.conf.worker_pool = "solo"
    typed(made, "")
    assert made.options is not None
    assert made.options["pool"] == "gw_celery.pool:TaskPool"
    assert made.conf.worker_pool == "solo"


def test_celerys_options_are_passed_on_as_it_reads_them(made: App) -> None:
    line = "-n one@%h -l INFO -E --autoscale 1,3 --time-limit 9 -Q a,b --without-gossip -f x.log"
    assert typed(made, line).exit_code == 0
    given = made.options or {}
    assert given["hostname"].startswith("one@")
    assert given["autoscale"] == (3, 1)
    assert given["queues"] == ["a", "b"]
    assert (given["time_limit"], given["task_events"]) == (9.0, True)
    assert (given["without_gossip"], given["logfile"]) == (True, "x.log")


def test_settings_of_the_project_stand_in_for_options_as_in_celerys_command(made: App) -> None:
    made.conf.worker_pidfile = "p.pid"
    typed(made, "")
    assert (made.options or {})["pidfile"] == "p.pid"


def test_configuration_on_the_command_line_works_as_in_celerys_command(made: App) -> None:
    assert typed(made, "-- worker.prefetch_multiplier=7").exit_code == 0
    assert made.conf.worker_prefetch_multiplier == 7


def test_the_help_shows_our_options_and_celerys(made: App) -> None:
    shown = typed(made, "--help").output
    for option in ("--gpu KIND", "--replicas", "--hostname", "--queues", "--max-tasks-per-child"):
        assert option in shown
    assert shown.index("--gpu") < shown.index("--hostname")
    assert shown.count("--help") == 1


def test_options_that_a_project_adds_to_celerys_worker_are_there(
    made: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    added = [*stock.worker.params, click.Option(["--colour"])]
    monkeypatch.setattr(stock.worker, "params", added)
    assert typed(made, "--colour red").exit_code == 0
    assert (made.options or {})["colour"] == "red"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-P prefork", "`gw worker` always has the GPU pool"),
        ("-c 4", "say --replicas N"),
        ("-c 4 --replicas 2", "say --replicas N"),
        ("-Q gpu.A100 --gpu A100", "give one of them"),
        ("--autoscale 3,1 --replicas 2", "leave out --replicas"),
        ("--autoscale 0,0", "with MAX 0 it would serve nothing"),
        ("-X celery", "give -Q"),
        ("--gpu A10", "did you mean 'A10G'?"),
        ("--gpu a100", "unknown GPU kind"),
        ("--replicas 0", "--replicas"),
        ("--replicas two", "--replicas"),
    ],
)
def test_options_that_contradict_each_other_are_a_usage_error(
    made: App, line: str, said: str
) -> None:
    result = typed(made, line)
    assert result.exit_code == 2
    assert said in result.output
    assert made.options is None


def test_a_kind_of_the_setting_is_known(made: App) -> None:
    made.conf.gw_gpu_kinds = ("B200",)
    assert typed(made, "--gpu B200").exit_code == 0
    assert typed_options(made).gpu == "B200"
