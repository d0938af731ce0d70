"""What is loaded for which parameters, counted: on the GPU pool and on prefork."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import ledger
import pytest
import tuned
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from tests import pooling
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = [pytest.mark.integration, pytest.mark.one_celery]

POOLS = ["gpu", "prefork"]
METHODS = ["classify", "classify_async", "classify_batched"]
MODELS = [f"m{number}" for number in range(10)]
StartTuned = Callable[..., WorkerProcess]


@pytest.fixture
def start_tuned(start_worker: StartWorker, ledger_path: Path) -> StartTuned:
    def start(pool: str = "gpu", **env: str) -> WorkerProcess:
        env = {"LEDGER": str(ledger_path), **env}
        if pool == "gpu":
            env["POOL"] = "gw_celery.pool:TaskPool"
        worker = start_worker("tuned:celery", env=env)
        if pool == "gpu":
            pooling.wait_loaded(worker)
        return worker

    return start


def loads(path: Path) -> list[str]:
    return [line[2] for line in ledger.words(path, "loading")]


def most_alive(path: Path) -> int:
    """How many instances there were at a time, from the first line of a load to its exit's last."""
    alive = most = 0
    for _, word, _ in ledger.read(path):
        alive += {"loading": 1, "unloaded": -1}[word]
        most = max(most, alive)
    return most


@pytest.mark.parametrize("pool", POOLS)
def test_100_calls_with_thresholds_from_01_to_09_load_once(
    pool: str, start_tuned: StartTuned, ledger_path: Path
) -> None:
    start_tuned(pool)
    sent = []
    for number in range(100):
        threshold = (number % 9 + 1) / 10
        method = getattr(tuned.Classifier(threshold=threshold), METHODS[number % 3])
        sent.append((threshold, method.delay(0.45)))
    assert [one.get(timeout=40) for _, one in sent] == [("m0", each < 0.45) for each, _ in sent]
    assert loads(ledger_path) == ["m0"]


@pytest.mark.parametrize("pool", POOLS)
def test_10_models_load_10_times_with_3_alive_at_most(
    pool: str, start_tuned: StartTuned, ledger_path: Path
) -> None:
    worker = start_tuned(pool)
    for model in MODELS:
        for method in METHODS * 2:
            sent = getattr(tuned.Classifier(model=model), method).delay(0.7)
            assert sent.get(timeout=20) == (model, True)
    assert loads(ledger_path) == MODELS
    assert worker.stop() == 0
    assert most_alive(ledger_path) == 3
    assert {line[2] for line in ledger.words(ledger_path, "unloaded")} == set(MODELS)


def test_100_calls_at_a_time_load_each_of_10_models_once_with_3_alive_at_most(
    start_tuned: StartTuned, ledger_path: Path, tmp_path: Path
) -> None:
    held = tmp_path / "go on"
    worker = start_tuned(HELD=str(held))
    models = MODELS[1:] * 11
    random.Random(7).shuffle(models)
    sent = [
        (model, getattr(tuned.Classifier(model=model), METHODS[number % 3]).delay(0.7))
        for number, model in enumerate(models)
    ]
    # All of them wait, for one load and for their turn behind it.
    eventually(lambda: pooling.replicas(worker, tuned.celery)[0]["in_flight"] == len(models), 30)
    held.touch()
    assert [one.get(timeout=40) for _, one in sent] == [(model, True) for model, _ in sent]
    assert sorted(loads(ledger_path)) == MODELS
    assert most_alive(ledger_path) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_ends_the_wait_of_one_input_for_a_load_and_of_no_other(
    method: str, start_tuned: StartTuned, ledger_path: Path, tmp_path: Path
) -> None:
    held = tmp_path / "go on"
    worker = start_tuned(HELD=str(held))
    (pid,) = eventually(lambda: pooling.ready_pids(worker, tuned.celery))
    call = getattr(tuned.Classifier(model="m1"), method)
    soft = call.apply_async((0.7,), soft_time_limit=0.3)
    hard = call.apply_async((0.7,), time_limit=0.3)
    patient = call.delay(0.7)
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=20)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=20)
    # The default's neighbours go on meanwhile, and for longer than a stuck body would be allowed.
    end = time.monotonic() + 2 * tuned.celery.conf.gw_cancel_timeout
    while time.monotonic() < end:
        assert tuned.Classifier().classify.delay(0.7).get(timeout=20) == ("m0", True)
    held.touch()
    assert patient.get(timeout=20) == ("m1", True)
    assert loads(ledger_path) == ["m0", "m1"]
    assert pooling.ready_pids(worker, tuned.celery) == [pid]
