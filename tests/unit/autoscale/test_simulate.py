"""The simulator: its queue, the figures and the command."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scaling_plot
from gw_celery import errors
from gw_celery.policy import scaling
from gw_celery.simulate import (
    __main__,
    cluster,
    runs,
    trace,
)
from tests.processes import ROOT

EXAMPLE = ROOT / "docs" / "traces" / "bursts.csv"
KEYS = {
    "over_target_share",
    "replica_seconds",
    "mean_wait",
    "p50_wait",
    "p99_wait",
    "max_wait",
    "starts",
    "served",
    "refused",
}


class Course:
    """A policy that is told in advance what to want, second by second."""

    on_arrival = False

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes

    def desired(self, now: float, observation: cluster.Observation) -> int:
        return self._sizes[min(int(now), len(self._sizes) - 1)]


def played(
    arrivals: Sequence[tuple[float, float]], scaler: cluster.Scaler, **given: Any
) -> cluster.Outcome:
    replayed = trace.Trace([at for at, _ in arrivals], [work for _, work in arrivals])
    asked = scenario(**{"start_up": 3.0, "most": 9} | given)
    return cluster.simulate(replayed, asked, [scaler], [0.0])


def poisson(seed: int, rate: float, count: int, workload: float = 1.0) -> trace.Trace:
    lot, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += lot.expovariate(rate)
        times.append(at)
    return trace.Trace([one - times[0] for one in times], [workload] * count)


def scenario(**given: Any) -> cluster.Scenario:
    rules = scaling.Rules(start_up=given.pop("start_up", 5.0))
    return cluster.Scenario(**({"score": 1.0, "rules": rules, "most": 20} | given))


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
    found = played([(0, 10), (0, 4), (9, 0)], Course(2, 2, 1), least=2)
    assert found.waits == [0, 0, 1]
    assert found.replica_seconds == 10 + 4


def test_an_idle_replica_that_has_gone_serves_no_more() -> None:
    found = played([(0, 0), (5, 4), (5, 4)], Course(2, 1), least=2)
    assert found.waits == [0, 0, 4]
    assert found.replica_seconds == 13 + 1


def test_a_replica_that_is_not_wanted_any_more_stops_starting() -> None:
    found = played([(0, 10), (0, 1)], Course(2, 1))
    assert found.waits == [0, 10]
    assert found.replica_seconds == 11 + 1


def test_a_draining_replica_takes_up_its_place() -> None:
    found = played([(0, 5), (0, 5)], Course(2, 1, 2), least=2, most=2)
    assert found.starts == 0
    assert found.replica_seconds == 10


def test_an_input_that_finds_the_queue_full_is_turned_away() -> None:
    found = played([(0, 9), (1, 1), (2, 1), (3, 1)], Course(1), queue_limit=1)
    assert found.waits == [0, 8, None, None]
    figures = runs.figures(found, 100.0)
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
    found = cluster.simulate(one, scenario(start_up=1.0, most=1), [Course(1)], [0.0])
    waits = [wait for wait in found.waits if wait is not None]
    assert sum(waits) / len(waits) == pytest.approx(0.5, rel=0.1)


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    one = poisson(3, 3.0, 600)
    found = [runs.play(one, scenario(seed=seed)).replica_seconds for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_nodes_share_the_maximum_and_serve_as_one_pool() -> None:
    one = poisson(4, 6.0, 3_000)
    single = runs.play(one, scenario(most=12))
    several, moments = scaling_plot.record(one, scenario(nodes=5, most=12))
    assert max(moment.actual for moment in moments) <= 12
    assert several.replica_seconds == pytest.approx(single.replica_seconds, rel=0.15)
    assert None not in several.waits


def test_our_policy_sees_no_workload_of_what_still_waits() -> None:
    first = poisson(5, 3.0, 200)
    later = trace.Trace([*first.times, first.seconds + 1], [*first.workloads, 1e3])
    sizes = [
        [moment.actual for moment in scaling_plot.record(each, scenario())[1]]
        for each in (first, later)
    ]
    seconds = int(first.seconds)
    assert sizes[0][:seconds] == sizes[1][:seconds]


def test_percentiles_are_waits_that_occurred() -> None:
    found = cluster.Outcome([float(n) for n in range(100, 0, -1)], 5.0, 2, 9.0)
    figures = runs.figures(found, 99.0)
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


def test_the_command_prints_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--startup", "10", "--max", "30", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == KEYS
    assert 0 <= figures["over_target_share"] <= 1
    assert all(math.isfinite(figures[key]) for key in KEYS)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([str(EXAMPLE), "--nodes", "3"]) == 0
    first, _, heads, line = capsys.readouterr().out.splitlines()
    assert first == "2,041 inputs"
    assert heads.split()[:2] == ["over", "target"]
    assert line.split()[0] == "gw_celery"


#: What the policy has always made of docs/traces/bursts.csv with a start-up of 5 s.
DECIDED = {"over_target_share": 0.0, "replica_seconds": 20829.58, "starts": 26, "max_wait": 7.954}


def test_the_policy_keeps_its_promises_on_the_example() -> None:
    figures = runs.figures(runs.play(trace.read(EXAMPLE), scenario(start_up=5.0, most=30)), 10.0)
    assert {key: figures[key] for key in DECIDED} == pytest.approx(DECIDED, abs=0.005)
