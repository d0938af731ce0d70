"""The benchmark of the autoscaler: other policies, the best fixed pool, and the plot."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import (
    scaling,
    scaling_hindsight,
    scaling_plot,
    scaling_rivals,
    scaling_traces,
)
from tests import simulator
from tests.simulator import EXAMPLE


def observed(**given: Any) -> Any:
    """What a policy is shown by the simulator."""
    return SimpleNamespace(**{"arrived": 0, "waiting": 0, "running": 0, "actual": 0, **given})


def test_the_best_fixed_pool_is_the_smallest_that_is_good() -> None:
    # Ten at once, of a second each: with five replicas the last two wait for one second.
    one = scaling_traces.ordered([(0.0, 1.0)] * 10)
    assert scaling_hindsight.best(one, 1.0, 1.0) == scaling_hindsight.Fixed(5, 10.0)
    assert scaling_hindsight.best(one, 1.0, 0.5) == scaling_hindsight.Fixed(10, 10.0)
    assert scaling_hindsight.best(one, 1.0, 9.0).replicas == 1
    assert scaling_hindsight.best(one, 1.0, 9.0, queue_limit=4).replicas == 6


def test_the_best_fixed_pool_waits_as_the_simulated_one(tmp_path: Path) -> None:
    inputs = simulator.poisson(2, 4.0, 2_000)
    path = simulator.write(tmp_path / "trace.csv", inputs)
    best = scaling_hindsight.best(scaling_traces.ordered(inputs), 1.0, 3.0).replicas
    fewer, enough = (
        simulator.figures(path, "--min", size, "--max", size, "--target-queue-time", 3)
        for size in (best - 1, best)
    )
    assert fewer["over_target_share"] > 0.01 >= enough["over_target_share"]


def test_stock_grows_at_a_message_and_shrinks_at_a_timer_after_its_keepalive() -> None:
    stock = scaling_rivals.Stock(1, 10)
    assert stock.desired(5.0, observed(arrived=7, waiting=6, running=1, actual=1)) == 7
    assert stock.desired(29.0, observed(arrived=7, actual=7)) == 7
    assert stock.desired(30.0, observed(arrived=7, actual=7)) == 7
    assert stock.desired(60.0, observed(arrived=7, actual=7)) == 1


def test_stock_of_celery_5_7_never_shrinks_while_messages_come() -> None:
    sizes = []
    for since_message in (True, False):
        stock = scaling_rivals.Stock(1, 10, since_message=since_message)
        stock.desired(0.0, observed(arrived=8, running=8, actual=1))
        for second in range(1, 100):
            size = stock.desired(float(second), observed(arrived=8 + second, running=1, actual=8))
        sizes.append(size)
    assert sizes == [8, 1]


def test_keda_wants_a_replica_for_five_that_wait_and_doubles_at_most() -> None:
    keda = scaling_rivals.Keda(1, 60)
    assert keda.desired(0.0, observed(waiting=100)) == 5
    assert keda.desired(14.0, observed(waiting=100)) == 5
    assert keda.desired(15.0, observed(waiting=100)) == 10
    assert keda.desired(30.0, observed(waiting=52)) == 10
    assert keda.desired(45.0, observed()) == 10
    assert keda.desired(315.0, observed()) == 10
    assert keda.desired(360.0, observed()) == 1


def test_keda_polls_for_the_first_input_and_cools_down_after_the_last() -> None:
    keda = scaling_rivals.Keda(0, 60)
    assert keda.desired(0.0, observed()) == 0
    assert keda.desired(10.0, observed(waiting=1)) == 0
    assert keda.desired(30.0, observed(waiting=1)) == 1
    assert [keda.desired(30.0 * n, observed()) for n in (2, 10, 11)] == [1, 1, 0]


def test_ray_wants_a_replica_for_two_ongoing_once_that_has_stood_for_its_delay() -> None:
    ray = scaling_rivals.Ray(1, 60)
    grown = [ray.desired(float(now), observed(waiting=6, running=1)) for now in range(31)]
    assert grown == [1] * 30 + [4]
    shrunk = [ray.desired(31.0 + now, observed()) for now in range(700)]
    assert shrunk[600] == 4
    # Its mean over 30 s falls below the size after some seconds only.
    assert shrunk.index(1) <= 630


def test_ray_starts_from_zero_at_once() -> None:
    ray = scaling_rivals.Ray(0, 60)
    assert ray.desired(0.0, observed()) == 0
    assert ray.desired(1.0, observed(waiting=9)) == 1


def test_the_command_prints_figures_of_all_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["compare", str(EXAMPLE), "--startup", "10", "--max", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    others = found.pop("policies")
    hindsight = {found.pop("best_fixed_replicas"), found.pop("best_fixed_replica_seconds")}
    assert min(hindsight) > 1
    assert others.keys() == {"stock", "keda", "ray"}
    assert all(other.keys() == found.keys() for other in others.values())
    assert found["of_best_fixed"] < others["stock"]["of_best_fixed"]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["compare", str(EXAMPLE), "--nodes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2,041 inputs; the best fixed pool in hindsight has")
    assert [line.split()[0] for line in lines[3:]] == ["gw_celery", "stock", "keda", "ray"]


def test_the_policy_keeps_its_promises_on_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["compare", str(EXAMPLE), "--startup", "5", "--max", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["over_target_share"] <= 0.01
    assert found["replica_seconds"] <= found["best_fixed_replica_seconds"]
    assert found["starts"] <= 60


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert scaling.main(["compare", str(EXAMPLE), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "said"),
    [("gone/plot.png", "there is no directory"), ("plot.xyz", "known are"), ("plot", "png")],
)
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert scaling.main(["compare", "no-such-trace.csv", "--plot", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_its_name_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert scaling.main(["compare", str(EXAMPLE), "--plot", "plot.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_plot_has_arrivals_backlog_and_desired_and_actual_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda sheet, path: drawn.append((sheet, path)))
    moments = [
        scaling_plot.Moment(at=float(at), arrived=3 * at, waiting=at, desired=4 + at, actual=9 - at)
        for at in range(5)
    ]
    scaling_plot.draw(moments, tmp_path / "plot.png", "a trace")
    ((sheet, path),) = drawn
    assert path == tmp_path / "plot.png"
    above, middle, below = sheet.axes
    lines = [[list(line.get_ydata()) for line in one.get_lines()] for one in sheet.axes]
    assert lines == [[[0, 3, 3, 3, 3]], [[0, 1, 2, 3, 4]], [[9, 8, 7, 6, 5], [4, 5, 6, 7, 8]]]
    assert all(
        list(line.get_xdata()) == [0, 1, 2, 3, 4] for one in sheet.axes for line in one.lines
    )
    assert above.get_title() == "a trace"
    assert [one.get_ylabel() for one in (above, middle, below)] == [
        "arrivals per second",
        "inputs waiting",
        "replicas",
    ]
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["actual", "desired"]
