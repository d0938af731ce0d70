"""What the simulator's command makes of its options, and costs."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gw_celery.policy import scaling
from gw_celery.simulate import __main__, cluster, runs, trace

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
def test_an_option_changes_what_our_policy_does(
    short: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert _figures(capsys, short, *BASE) == _figures(capsys, short, *BASE)
    assert _figures(capsys, short, *BASE, *option) != _figures(capsys, short, *BASE)


def test_to_zero_only_with_a_timeout(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_zero = (*BASE, "--min", "0")
    patient, eager = (
        _figures(capsys, short, *to_zero, *given) for given in ((), ("--inactivity-timeout", "5"))
    )
    assert eager["replica_seconds"] < patient["replica_seconds"]


def test_the_minimum_and_the_limit_of_the_queue_are_kept(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As many at least as at most: that pool is fixed, and so are those of all nodes together.
    for nodes in ("1", "4"):
        fixed = _told(capsys, short, *BASE, "--min", "4", "--max", "4", "--nodes", nodes)
        assert fixed["starts"] == 0
    full = _told(capsys, short, *BASE, "--max", "1", "--queue-limit", "3")
    assert full["refused"] > 0


def _told(capsys: pytest.CaptureFixture[str], *given: object) -> dict[str, Any]:
    capsys.readouterr()
    assert __main__.main([*map(str, given), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _figures(capsys: pytest.CaptureFixture[str], *given: object) -> dict[str, float]:
    found = _told(capsys, *given)
    return {key: found[key] for key in OURS}


# -- a thousand deciders --


def test_a_decider_among_a_thousand_costs_no_more_than_alone() -> None:
    # An hour of a thousand is to take less than a minute: 3.6 million decisions of 116 lines each
    # took 37 s. Lines are counted, for they are the same on every machine at any moment.
    lot = random.Random(3)
    steady = trace.Trace(sorted(lot.uniform(0, 10) for _ in range(30)), [0.1] * 30)

    def lines_of_a_decision(nodes: int) -> float:
        scenario = cluster.Scenario(score=1.0, rules=scaling.Rules(), most=20, nodes=nodes)
        seconds = math.ceil(runs.play(steady, scenario).end)
        return _lines(lambda: runs.play(steady, scenario)) / (seconds * nodes)

    assert lines_of_a_decision(1000) < min(150, 1.1 * lines_of_a_decision(100))


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


def test_times_of_two_kinds_and_a_size_beyond_all_are_refused(
    tmp_path: Path, short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed.csv"
    mixed.write_text(FOREVER)
    assert __main__.main([str(mixed)]) == 2
    assert "1,000,000,000 s, and 2,592,000 at most" in capsys.readouterr().err
    for option in ("--max", "--nodes"):
        with pytest.raises(SystemExit):
            __main__.main([str(short), option, "1000000000"])
        assert "a whole number from 1 to 100,000" in capsys.readouterr().err
