"""The simulator: its queue, the compared rules, the figures and the command."""

from __future__ import annotations

import builtins
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gw_celery import errors
from gw_celery.policy import scaling
from gw_celery.simulate import __main__, cluster, hindsight, policies, report, runs, trace
from tests.processes import ROOT

EXAMPLE = ROOT / "docs" / "traces" / "bursts.csv"
KEYS = {
    "over_target_share",
    "replica_seconds",
    "best_fixed_replicas",
    "best_fixed_replica_seconds",
    "mean_wait",
    "p50_wait",
    "p99_wait",
    "max_wait",
    "starts",
}


class Course:
    """A policy that is told in advance what to want, second by second."""

    on_arrival = False

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes

    def desired(self, now: float, facts: cluster.Facts) -> int:
        return self._sizes[min(int(now), len(self._sizes) - 1)]


def played(
    arrivals: Sequence[tuple[float, float]], scaler: cluster.Scaler, **machines: Any
) -> cluster.Played:
    given = {"score": 1.0, "start_up": 3.0, "initial": 1, "room": 9} | machines
    one = trace.Trace([at for at, _ in arrivals], [work for _, work in arrivals])
    return cluster.play(one, cluster.Machines(**given), [scaler], [0.0])


def poisson(seed: int, rate: float, count: int, workload: float = 1.0) -> trace.Trace:
    lot, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += lot.expovariate(rate)
        times.append(at)
    return trace.Trace([one - times[0] for one in times], [workload] * count)


def ask(**given: Any) -> runs.Question:
    rules = scaling.Rules(start_up=given.pop("start_up", 5.0))
    return runs.Question(**({"score": 1.0, "rules": rules, "most": 20} | given))


def facts(**given: Any) -> cluster.Facts:
    return cluster.Facts(**given)


def test_one_replica_serves_one_input_at_a_time_in_the_order_of_arrival() -> None:
    found = played([(0, 4), (1, 2), (2, 1)], Course(1))
    assert found.waits == [0, 3, 4]
    assert found.end == 7
    assert found.replica_seconds == 7
    assert found.starts == 0


def test_a_replica_costs_from_its_start_and_serves_after_it() -> None:
    found = played([(0, 10), (0, 10)], Course(2))
    assert found.waits == [0, 3]
    assert found.starts == 1
    assert found.replica_seconds == 13 + 13


def test_a_busy_replica_ends_its_input_before_it_goes() -> None:
    found = played([(0, 10), (0, 4), (9, 0)], Course(2, 2, 1), initial=2)
    assert found.waits == [0, 0, 1]
    assert found.replica_seconds == 10 + 4


def test_an_idle_replica_that_has_gone_serves_no_more() -> None:
    found = played([(0, 0), (5, 4), (5, 4)], Course(2, 1), initial=2)
    assert found.waits == [0, 0, 4]
    assert found.replica_seconds == 13 + 1


def test_a_replica_that_is_not_wanted_any_more_stops_starting() -> None:
    found = played([(0, 10), (0, 1)], Course(2, 1))
    assert found.waits == [0, 10]
    assert found.replica_seconds == 11 + 1


def test_a_draining_replica_takes_up_its_place() -> None:
    found = played([(0, 5), (0, 5)], Course(2, 1, 2), initial=2, room=2)
    assert found.starts == 0
    assert found.replica_seconds == 10


def test_an_input_that_finds_the_queue_full_is_turned_away() -> None:
    found = played([(0, 9), (1, 1), (2, 1), (3, 1)], Course(1), queue_limit=1)
    assert found.waits == [0, 8, None, None]
    figures = report.figures(found, hindsight.Fixed(1, 10.0), 100.0)
    assert figures["refused"] == 2
    assert figures["over_target_share"] == 0.5


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 60), st.floats(0, 20)), min_size=1, max_size=40),
    st.lists(st.integers(1, 9), min_size=1, max_size=80),
)
def test_no_input_is_lost_whatever_the_policy_wants(
    arrivals: list[tuple[float, float]], sizes: list[int]
) -> None:
    found = played(sorted(arrivals), Course(*sizes))
    assert all(wait is not None and wait >= 0 for wait in found.waits)
    assert found.replica_seconds >= sum(work for _, work in arrivals) - 1e-6


def test_a_single_replica_waits_as_the_theory_of_queues_says() -> None:
    # M/D/1 at a load of one half: the mean wait is load * service / (2 * (1 - load)).
    one = poisson(1, 0.5, 20_000)
    machines = cluster.Machines(score=1.0, start_up=1.0, initial=1, room=1)
    found = cluster.play(one, machines, [Course(1)], [0.0])
    waits = [wait for wait in found.waits if wait is not None]
    assert sum(waits) / len(waits) == pytest.approx(0.5, rel=0.1)


def test_the_best_fixed_pool_is_the_smallest_that_is_good() -> None:
    # Ten at once, of a second each: with five replicas the last two wait for one second.
    one = trace.Trace([0.0] * 10, [1.0] * 10)
    assert hindsight.best(one, 1.0, 1.0) == hindsight.Fixed(5, 10.0)
    assert hindsight.best(one, 1.0, 0.5) == hindsight.Fixed(10, 10.0)
    assert hindsight.best(one, 1.0, 9.0).replicas == 1
    assert hindsight.best(one, 1.0, 9.0, queue_limit=4).replicas == 6


def test_the_best_fixed_pool_waits_as_the_simulated_one() -> None:
    one = poisson(2, 4.0, 2_000)
    fixed = hindsight.best(one, 1.0, 3.0)
    shares = []
    for size in (fixed.replicas - 1, fixed.replicas):
        machines = cluster.Machines(score=1.0, start_up=1.0, initial=size, room=size)
        found = cluster.play(one, machines, [Course(size)], [0.0])
        shares.append(report.figures(found, fixed, 3.0)["over_target_share"])
    assert shares[0] > 0.01 >= shares[1]


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    one = poisson(3, 3.0, 600)
    found = [runs.play(one, ask(seed=seed)).replica_seconds for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_nodes_share_the_maximum_and_serve_as_one_pool() -> None:
    one = poisson(4, 6.0, 3_000)
    single, several = (runs.play(one, ask(nodes=nodes, most=12)) for nodes in (1, 5))
    assert all(moment.actual <= 12 for moment in several.moments)
    assert several.replica_seconds == pytest.approx(single.replica_seconds, rel=0.15)
    assert None not in several.waits


def test_our_policy_sees_no_workload_of_what_still_waits() -> None:
    first = poisson(5, 3.0, 200)
    later = trace.Trace([*first.times, first.seconds + 1], [*first.workloads, 1e3])
    sizes = [[one.actual for one in runs.play(each, ask()).moments] for each in (first, later)]
    seconds = int(first.seconds)
    assert sizes[0][:seconds] == sizes[1][:seconds]


def test_stock_grows_at_a_message_and_shrinks_at_a_timer_after_its_keepalive() -> None:
    stock = policies.Stock(1, 10)
    assert stock.desired(5.0, facts(arrived=7, waiting=6, running=1, actual=1)) == 7
    assert stock.desired(29.0, facts(arrived=7, actual=7)) == 7
    assert stock.desired(30.0, facts(arrived=7, actual=7)) == 7
    assert stock.desired(60.0, facts(arrived=7, actual=7)) == 1


def test_stock_of_celery_5_7_never_shrinks_while_messages_come() -> None:
    sizes = []
    for since_message in (True, False):
        stock = policies.Stock(1, 10, since_message=since_message)
        stock.desired(0.0, facts(arrived=8, running=8, actual=1))
        for second in range(1, 100):
            size = stock.desired(float(second), facts(arrived=8 + second, running=1, actual=8))
        sizes.append(size)
    assert sizes == [8, 1]


def test_keda_wants_a_replica_for_five_that_wait_and_doubles_at_most() -> None:
    keda = policies.Keda(1, 60)
    assert keda.desired(0.0, facts(waiting=100)) == 5
    assert keda.desired(14.0, facts(waiting=100)) == 5
    assert keda.desired(15.0, facts(waiting=100)) == 10
    assert keda.desired(30.0, facts(waiting=52)) == 10
    assert keda.desired(45.0, facts()) == 10
    assert keda.desired(315.0, facts()) == 10
    assert keda.desired(360.0, facts()) == 1


def test_keda_polls_for_the_first_input_and_cools_down_after_the_last() -> None:
    keda = policies.Keda(0, 60)
    assert keda.desired(0.0, facts()) == 0
    assert keda.desired(10.0, facts(waiting=1)) == 0
    assert keda.desired(30.0, facts(waiting=1)) == 1
    assert [keda.desired(30.0 * n, facts()) for n in (2, 10, 11)] == [1, 1, 0]


def test_ray_wants_a_replica_for_two_ongoing_once_that_has_stood_for_its_delay() -> None:
    ray = policies.Ray(1, 60)
    grown = [ray.desired(float(now), facts(waiting=6, running=1)) for now in range(31)]
    assert grown == [1] * 30 + [4]
    shrunk = [ray.desired(31.0 + now, facts()) for now in range(700)]
    assert shrunk[600] == 4
    # Its mean over 30 s falls below the size after some seconds only.
    assert shrunk.index(1) <= 630


def test_ray_starts_from_zero_at_once() -> None:
    ray = policies.Ray(0, 60)
    assert ray.desired(0.0, facts()) == 0
    assert ray.desired(1.0, facts(waiting=9)) == 1


def test_percentiles_are_waits_that_occurred() -> None:
    found = cluster.Played([float(n) for n in range(100, 0, -1)], 5.0, 2, 9.0)
    figures = report.figures(found, hindsight.Fixed(3, 30.0), 99.0)
    assert (figures["p50_wait"], figures["p99_wait"], figures["max_wait"]) == (50.0, 99.0, 100.0)
    assert figures["mean_wait"] == 50.5
    assert figures["over_target_share"] == 0.01


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_of_tokens_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2026-01-01 00:00:02.5000000,100,7\n"
        "2026-01-01 00:00:01.0000000,200,0\n",
    )
    assert trace.read(path) == trace.Trace([0.0, 1.5], [200.0, 170.0])
    assert trace.read(path, generated_factor=1.0).workloads == [200.0, 107.0]


def test_a_trace_of_seconds_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "workload,seconds\n2,10\n\n3,12.5\n")
    assert trace.read(path) == trace.Trace([0.0, 2.5], [2.0, 3.0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "line 1: the columns are 'a,b'; they have to be TIMESTAMP,"),
        ("", "line 1"),
        ("seconds,workload\n", "no line with an input"),
        ("seconds,workload\n1,2\n3,many\n", "line 3: '3,many'"),
        ("seconds,workload\n1\n", "line 2: '1'"),
        ("seconds,workload\n1,-2\n", "the workload is 0 or more"),
        ("seconds,workload\nnan,2\n", "finite"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2: 'soon,1,2'"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(errors.TraceError):
        trace.read(path)
    assert __main__.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_file_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["nowhere.csv"]) == 2
    assert "nowhere.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--score", "0"],
        ["--startup", "-1"],
        ["--max", "0"],
        ["--nodes", "1.5"],
        ["--target-util", "2"],
        ["--score", "quick"],
        ["--queue-limit", "nan"],
    ],
)
def test_an_option_out_of_bounds_ends_with_code_2(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main([str(EXAMPLE), *options])
    assert ended.value.code == 2
    assert "give a" in capsys.readouterr().err


def test_bounds_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--min", "9", "--max", "3"]) == 2
    assert "raise --max or lower --min" in capsys.readouterr().err


def test_a_score_in_another_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--score", "0.000001"]) == 2
    assert "give the --score" in capsys.readouterr().err


def test_the_command_prints_figures_of_all_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--startup", "10", "--max", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["policies"].keys() == {"stock", "keda", "ray"}
    assert all(one.keys() >= KEYS for one in found["policies"].values())
    assert found["best_fixed_replicas"] == found["policies"]["ray"]["best_fixed_replicas"]
    assert 0 <= found["over_target_share"] <= 1
    assert all(math.isfinite(found[key]) for key in KEYS)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--nodes", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["gw_celery", "stock", "keda", "ray"]


def test_the_policy_keeps_its_promises_on_the_example() -> None:
    one = trace.read(EXAMPLE)
    found, _ = runs.compare(one, ask(start_up=5.0, most=30))
    assert found["over_target_share"] <= 0.01
    assert found["replica_seconds"] <= found["best_fixed_replica_seconds"]
    assert found["starts"] <= 60


def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert __main__.main([str(EXAMPLE), "--plot", str(path)]) == 0
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
    assert __main__.main(["no-such-trace.csv", "--plot", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert __main__.main([str(EXAMPLE), "--plot", "plot.png"]) == 2
    assert "pip install 'gw-celery[plots]'" in capsys.readouterr().err
