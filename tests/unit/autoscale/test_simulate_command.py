"""The simulator by its command: what it reads, what it prints, what options change, its costs."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import simulator
from tests.simulator import EXAMPLE, figures

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
#: The figures that options change.
OURS = ("replica_seconds", "starts", "mean_wait", "max_wait", "over_target_share")
#: Longer than can be played.
FOREVER = "seconds,workload\n0,1\n1e9,1\n"
BASE = ("--score", "2", "--startup", "5", "--min", "1", "--max", "12")


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Four minutes of tokens, a burst in each, and a pause."""
    lot, path = random.Random(11), tmp_path / "trace.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for second in (*range(120), *range(180, 240)):
        for _ in range(4 if second % 60 < 15 else lot.choice((0, 0, 1))):
            moment = f"2026-01-01 00:{second // 60:02}:{second % 60:02}.{lot.randrange(1000):03}"
            lines.append(f"{moment},{lot.randint(1, 2)},{lot.randint(0, 1)}")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "option",
    [
        ("--score", "4"),
        ("--startup", "20"),
        ("--min", "3"),
        ("--max", "3"),
        ("--target-queue-time", "4"),
        ("--target-util", "0.4"),
        ("--queue-limit", "5"),
        ("--nodes", "4"),
        ("--seed", "1"),
        ("--window", "15"),
        ("--generated-factor", "1"),
    ],
    ids=lambda option: option[0],
)
def test_an_option_changes_what_our_policy_does(short: Path, option: tuple[str, str]) -> None:
    assert _ours(short, *BASE) == _ours(short, *BASE)
    assert _ours(short, *BASE, *option) != _ours(short, *BASE)


def test_to_zero_only_with_a_timeout(short: Path) -> None:
    to_zero = (*BASE, "--min", "0")
    patient, eager = (
        figures(short, *to_zero, *given) for given in ((), ("--inactivity-timeout", "5"))
    )
    assert eager["replica_seconds"] < patient["replica_seconds"]


def test_the_minimum_and_the_limit_of_the_queue_are_kept(short: Path) -> None:
    # As many at least as at most: that pool is fixed, and so are those of all nodes together.
    for nodes in ("1", "4"):
        fixed = figures(short, *BASE, "--min", "4", "--max", "4", "--nodes", nodes)
        assert fixed["starts"] == 0
    full = figures(short, *BASE, "--max", "1", "--queue-limit", "3")
    assert full["refused"] > 0


def _ours(*given: object) -> dict[str, float]:
    found = figures(*given)
    return {key: found[key] for key in OURS}


# -- a pool of one size --


def fixed(tmp_path: Path, size: int, inputs: list[tuple[float, float]], *given: object) -> Any:
    path = simulator.write(tmp_path / "trace.csv", inputs)
    return figures(path, "--min", size, "--max", size, *given)


def test_one_replica_serves_one_input_at_a_time_in_the_order_of_arrival(tmp_path: Path) -> None:
    found = fixed(tmp_path, 1, [(0, 4), (1, 2), (2, 1)])
    waits = [found[key] for key in ("p50_wait", "max_wait", "mean_wait")]
    assert waits == [3, 4, pytest.approx(7 / 3)]
    assert (found["served"], found["starts"], found["replica_seconds"]) == (3, 0, 7)


def test_an_input_that_finds_the_queue_full_is_turned_away(tmp_path: Path) -> None:
    inputs = [(0.0, 9.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    found = fixed(tmp_path, 1, inputs, "--queue-limit", 1, "--target-queue-time", 100)
    assert (found["served"], found["refused"], found["max_wait"]) == (2, 2, 8)
    assert found["over_target_share"] == 0.5


def test_percentiles_are_waits_that_occurred(tmp_path: Path) -> None:
    found = fixed(tmp_path, 1, [(0.0, 1.0)] * 100, "--target-queue-time", 98)
    assert (found["p50_wait"], found["p99_wait"], found["max_wait"]) == (49, 98, 99)
    assert (found["mean_wait"], found["over_target_share"]) == (49.5, 0.01)


def test_a_single_replica_waits_as_the_theory_of_queues_says(tmp_path: Path) -> None:
    # M/D/1 at a load of one half: the mean wait is load * service / (2 * (1 - load)).
    found = fixed(tmp_path, 1, simulator.poisson(1, 0.5, 20_000))
    assert found["mean_wait"] == pytest.approx(0.5, rel=0.1)


def test_the_same_seed_gives_the_same_and_another_one_another(tmp_path: Path) -> None:
    path = simulator.write(tmp_path / "trace.csv", simulator.poisson(3, 3.0, 600))
    first, again, other = (figures(path, "--seed", seed)["replica_seconds"] for seed in (1, 1, 2))
    assert first == again != other


# -- a thousand deciders --


def test_a_decider_among_a_thousand_costs_no_more_than_alone(tmp_path: Path) -> None:
    # An hour of a thousand is to take less than a minute: 3.6 million decisions of 116 lines each
    # took 37 s. Lines are counted, for they are the same on every machine at any moment.
    lot = random.Random(3)
    steady = sorted((lot.uniform(0, 10), 0.1) for _ in range(30))
    path = simulator.write(tmp_path / "trace.csv", steady)

    def lines(nodes: int) -> int:
        return _lines(lambda: simulator.run(path, "--max", 20, "--nodes", nodes))

    lines(1)  # what the first run imports
    alone = lines(1)
    hundred, thousand = lines(100) - alone, lines(1000) - alone
    seconds = math.ceil(steady[-1][0] - steady[0][0] + 0.1)
    assert thousand / (999 * seconds) < min(150, 1.1 * hundred / (99 * seconds))


def _lines(work: Callable[[], object]) -> int:
    """How many lines of Python ran."""
    count = 0

    def see(frame: object, event: str, arg: object) -> object:
        nonlocal count
        count += event == "line"
        return see

    before = sys.gettrace()
    sys.settrace(see)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


# -- what it reads --


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
    for given, second in (((), 170.0), (("--generated-factor", "1"), 107.0)):
        # One replica is busy with the first for 200 s, and the second came 1.5 s after it.
        found = figures(path, "--max", 1, *given)
        assert (found["max_wait"], found["replica_seconds"]) == (198.5, 200.0 + second)


def test_a_trace_of_seconds_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "workload,seconds\n2,10\n\n3,11.5\n")
    found = figures(path, "--max", 1)
    assert (found["served"], found["max_wait"], found["replica_seconds"]) == (2, 0.5, 5.0)


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
        pytest.param(FOREVER, "1,000,000,000 s, and 2,592,000 at most", id="times of two kinds"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    ended = simulator.run(written(tmp_path, text))
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_file_that_is_not_there_is_said() -> None:
    ended = simulator.run("nowhere.csv")
    assert ended.code == 2
    assert "nowhere.csv" in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--score", "0"], "give a"),
        (["--startup", "-1"], "give a"),
        (["--max", "0"], "give a"),
        (["--nodes", "1.5"], "give a"),
        (["--target-util", "2"], "give a"),
        (["--score", "quick"], "give a"),
        (["--queue-limit", "nan"], "give a"),
        (["--max", "1000000000"], "a whole number from 1 to 100,000"),
        (["--nodes", "1000000000"], "a whole number from 1 to 100,000"),
        (["--min", "9", "--max", "3"], "raise --max or lower --min"),
        pytest.param(["--score", "0.000001"], "give the --score", id="another unit"),
    ],
)
def test_an_option_out_of_bounds_ends_with_code_2(options: list[str], said: str) -> None:
    ended = simulator.run(EXAMPLE, *options)
    assert ended.code == 2
    assert said in ended.err


# -- what it prints --


def test_the_command_prints_figures() -> None:
    found = figures(EXAMPLE, "--startup", "10", "--max", "30")
    assert found.keys() == KEYS
    assert 0 <= found["over_target_share"] <= 1
    assert all(math.isfinite(found[key]) for key in KEYS)


def test_the_command_prints_a_table() -> None:
    first, _, heads, line = simulator.run(EXAMPLE, "--nodes", "3").out.splitlines()
    assert first == "2,041 inputs"
    assert heads.split()[:2] == ["over", "target"]
    assert line.split()[0] == "gw_celery"


#: What the policy has always made of docs/traces/bursts.csv with a start-up of 5 s.
DECIDED = {"over_target_share": 0.0, "replica_seconds": 20829.58, "starts": 26, "max_wait": 7.954}


def test_the_policy_keeps_its_promises_on_the_example() -> None:
    found = figures(EXAMPLE, "--startup", 5, "--max", 30)
    assert {key: found[key] for key in DECIDED} == pytest.approx(DECIDED, abs=0.005)
