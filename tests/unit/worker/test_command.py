"""``celery -A proj gw worker``, from the command line to the worker that Celery would make."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import pytest
from celery import Celery
from celery.bin import worker as stock
from celery.bin.celery import celery as celery_command
from click.testing import CliRunner, Result


class App(Celery):
    """An app that notes with which options Celery would make its worker."""

    options: dict[str, Any] | None = None

    @property
    def Worker(self) -> Any:  # noqa: N802
        def make(**options: Any) -> Any:
            self.options = options
            return SimpleNamespace(start=lambda: None, exitcode=0)

        return make

    @property
    def given(self) -> dict[str, Any]:
        assert self.options is not None
        return self.options


@pytest.fixture
def made() -> Iterator[App]:
    with App("typed", broker="memory://", set_as_current=False) as app:
        yield app


def typed(made: App, line: str) -> Result:
    """What ``celery gw worker`` does with a line, for this app."""
    gw = celery_command.get_command(click.Context(celery_command), "gw")
    assert gw is not None
    obj = SimpleNamespace(app=made, no_color=True, quiet=True)
    return CliRunner().invoke(gw, ["worker", *line.split()], obj=obj)


@pytest.mark.parametrize(
    ("line", "gpu", "replicas", "names_queues"),
    [
        ("", None, None, False),
        ("--gpu A100", "A100", None, False),
        ("--gpu CPU --replicas 2", "CPU", 2, False),
        ("-Q gpu.A100.embed,celery -X celery", None, None, True),
    ],
)
def test_what_was_typed_reaches_the_worker(
    made: App, line: str, gpu: str | None, replicas: int | None, names_queues: bool
) -> None:
    result = typed(made, line)
    assert result.exit_code == 0, result.output
    reached = made.given["gw_options"]
    assert (reached.gpu, reached.replicas, reached.names_queues) == (gpu, replicas, names_queues)


def test_the_pool_is_ours_for_this_worker_only(made: App) -> None:
    made.conf.worker_pool = "solo"
    typed(made, "")
    assert made.given["pool"] == "gw_celery.pool:TaskPool"
    assert made.conf.worker_pool == "solo"


def test_celerys_options_are_passed_on_as_it_reads_them(made: App) -> None:
    line = "-n one@%h -l INFO -E --autoscale 1,3 --time-limit 9 -Q a,b --without-gossip -f x.log"
    assert typed(made, line).exit_code == 0
    given = made.given
    assert given["hostname"].startswith("one@")
    assert given["autoscale"] == (3, 1)
    assert given["queues"] == ["a", "b"]
    assert (given["time_limit"], given["task_events"]) == (9.0, True)
    assert (given["without_gossip"], given["logfile"]) == (True, "x.log")


def test_settings_of_the_project_stand_in_for_options_as_in_celerys_command(made: App) -> None:
    made.conf.worker_pidfile = "p.pid"
    typed(made, "")
    assert made.given["pidfile"] == "p.pid"


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
    added = [*stock.worker.params, click.Option(["--colour"])]
    monkeypatch.setattr(stock.worker, "params", added)
    assert typed(made, "--colour red").exit_code == 0
    assert made.given["colour"] == "red"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-P prefork", "`gw worker` always has the GPU pool"),
        ("-c 4", "say --replicas N"),
        ("-c 4 --replicas 2", "say --replicas N"),
        ("-Q gpu.A100 --gpu A100", "give one of them"),
        ("--autoscale 3,1 --replicas 2", "leave out --replicas"),
        ("--autoscale 0,0", "MAX 0 would serve nothing; give 1 or more"),
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
    assert made.given["gw_options"].gpu == "B200"
