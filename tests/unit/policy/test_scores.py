from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gw_celery.policy import scores


def a_round(elapsed: float, *latencies: float, workload: float = 1.0, **rest: Any) -> scores.Round:
    return scores.Round(
        elapsed=elapsed, workload=workload * len(latencies), latencies=latencies, **rest
    )


def failing(elapsed: float, *, count: int = 10) -> scores.Round:
    return a_round(elapsed, failures=count, failure="ValueError: no weights")


def test_the_score_is_the_throughput_of_the_median_round() -> None:
    score = scores.of("t", [a_round(1.0, 1.0), a_round(0.5, 0.5), a_round(0.1, 0.1)])
    assert (score.value, score.least, score.most) == (2.0, 1.0, 10.0)
    assert score.rounds == (1.0, 2.0, 10.0)
    assert (score.success_rate, score.failure) == (1.0, "")


def test_workload_is_counted_and_not_inputs() -> None:
    assert scores.of("t", [a_round(0.5, 0.5, 0.4, workload=30.0)]).value == 120.0


def test_latencies_are_those_of_all_rounds() -> None:
    rounds = [a_round(1.0, *(n / 100 for n in range(start, 101, 2))) for start in (1, 2)]
    score = scores.of("t", rounds)
    assert (score.p50, score.p95) == (0.5, 0.95)


def test_a_function_that_always_raises_has_no_score_however_quick_it_is() -> None:
    with pytest.raises(
        scores.NoScore, match=r"all of its 20 inputs failed.*ValueError: no weights"
    ):
        scores.of("t", [failing(1e-6), failing(1e-6)])


def test_failures_take_time_and_have_no_workload() -> None:
    rounds = [a_round(1.0, 0.1, failures=3, failure="KeyError: 'x'") for _ in range(3)]
    score = scores.of("t", rounds)
    assert score.value == 1.0
    assert (score.success_rate, score.failure) == (0.25, "KeyError: 'x'")


def test_where_most_rounds_fail_the_score_is_all_workload_by_all_time() -> None:
    score = scores.of("t", [failing(1.0), failing(1.0), a_round(2.0, 0.5, 2.0)])
    assert score.value == 0.5
    assert score.least == 0.0


def test_inputs_without_any_workload_give_no_score() -> None:
    with pytest.raises(scores.NoScore, match="workload_calculator returned 0"):
        scores.of("t", [a_round(1.0, 0.5, workload=0.0)])


SCORE = scores.of("t", [a_round(1.0, 0.2, 0.4), failing(0.5)])
WRITTEN = json.loads(json.dumps(dataclasses.asdict(SCORE)))


def test_a_score_is_read_as_it_was_written() -> None:
    assert scores.from_json(WRITTEN) == SCORE


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {**WRITTEN, "more": 1},
        {**WRITTEN, "task": 1},
        {**WRITTEN, "value": 0},
        {**WRITTEN, "value": "9"},
        {**WRITTEN, "p50": None},
        {**WRITTEN, "p95": float("nan")},
        {**WRITTEN, "p95": float("inf")},
        {**WRITTEN, "least": True},
        {**WRITTEN, "least": -1.0},
        {**WRITTEN, "most": [1]},
        {**WRITTEN, "rounds": []},
        {**WRITTEN, "rounds": "12"},
        {**WRITTEN, "rounds": [-1.0]},
    ],
)
def test_anything_else_is_no_score(document: object) -> None:
    with pytest.raises(ValueError, match=r"score"):
        scores.from_json(document)
