"""Contexts, class tasks and async bodies under Celery's own prefork and solo pools."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger
import pytest
import served
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from gw_celery import errors
from tests.processes import StartWorker, WorkerProcess, eventually

pytestmark = pytest.mark.integration

POOLS = ["prefork", "solo"]
StartServed = Callable[..., WorkerProcess]


@pytest.fixture
def start_served(start_worker: StartWorker, ledger_path: Path) -> StartServed:
    """Start a worker of ``served`` whose bodies write to the ledger of the test."""

    def start(pool: str, env: dict[str, str] | None = None, **options: Any) -> WorkerProcess:
        env = {"LEDGER": str(ledger_path), **(env or {})}
        return start_worker("served:celery", pool=pool, env=env, **options)

    return start


@pytest.mark.parametrize("pool", POOLS)
def test_contexts_and_hooks_enter_once_in_parallel_and_leave_on_warm_shutdown(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    worker = start_served(pool, {"LOAD": "1"})
    assert [served.square.delay(x).get(timeout=20) for x in range(4)] == [0, 1, 4, 9]
    assert served.Classifier().classify.remote(0.6) == "positive"
    done = [line[1:] for line in ledger.read(ledger_path)]
    # Parallel: both have begun before either has entered, a second later.
    first_entered = min(done.index(["entered", name]) for name in ("Model", "Tokenizer"))
    assert {"Model", "Tokenizer"} <= {words[1] for words in done[:first_entered]}
    assert worker.stop() == 0
    for line in (["entering", "Model"], ["entering", "Tokenizer"], ["loading", "small"]):
        assert [words[1:] for words in ledger.read(ledger_path)].count(line) == 1
    left = {tuple(words[1:]) for words in ledger.read(ledger_path)[-3:]}
    assert left == {("left", "Model"), ("left", "Tokenizer"), ("unloaded", "smallsmall")}


@pytest.mark.parametrize("pool", POOLS)
def test_the_loop_of_a_context_runs_on_between_two_tasks(
    pool: str, start_served: StartServed
) -> None:
    start_served(pool)
    first = served.beats.remote()
    later = eventually(lambda: beats if (beats := served.beats.remote()) > first + 5 else 0)
    assert later > first + 5


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_of_other_queues_enters_nothing(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    start_served(pool, queues="celery")
    assert served.plain.delay(1).get(timeout=20) == 2
    (why,) = served.has_contexts.delay().get(timeout=20)
    assert "this is not a GPU worker" in why
    with pytest.raises(errors.NotServedError, match="start a worker with -Q cpu"):
        served.square.apply_async((2,), queue="celery").get(timeout=20)
    assert ledger.read(ledger_path) == []


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("context", "served.Model: OSError: the weights are not there"),
        ("hook", "served.Classifier: RuntimeError: CUDA is not there"),
    ],
)
def test_a_worker_that_cannot_load_ends_and_leaves_its_messages_in_the_broker(
    pool: str, what: str, reason: str, start_served: StartServed, ledger_path: Path
) -> None:
    sent = [served.record.delay(f"r{n}") for n in range(3)]
    worker = start_served(pool, {"FAIL": what, "LOAD": "2"}, wait_ready=False)
    assert worker.wait_exit(40) != 0
    assert reason in worker.log_text()
    assert ledger.words(ledger_path, "began") == []
    # Each context that was entered is left again before the process ends.
    entered = {line[2] for line in ledger.words(ledger_path, "entered")}
    assert entered == {line[2] for line in ledger.words(ledger_path, "left")}
    start_served(pool)
    assert [one.get(timeout=20) for one in sent] == ["r0", "r1", "r2"]
    assert len(ledger.words(ledger_path, "began")) == 3


@pytest.mark.parametrize("pool", POOLS)
def test_a_context_that_blocks_the_event_loop_fails_the_worker_at_the_deadline(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    sent = served.record.delay("kept")
    env = {"FAIL": "blocked", "START_TIMEOUT": "2", "CANCEL_TIMEOUT": "1"}
    worker = start_served(pool, env, wait_ready=False)
    assert worker.wait_exit(60) == 1
    log = worker.log_text()
    assert "served.Model: TimeoutError: still blocks the event loop" in log
    assert "in __aenter__" in log
    assert ledger.words(ledger_path, "began") == []
    start_served(pool)
    assert sent.get(timeout=20) == "kept"


@pytest.mark.parametrize("pool", POOLS)
def test_a_warm_shutdown_ends_a_load_and_leaves_what_has_entered(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    worker = start_served(pool, {"LOAD": "120", "LOAD_TOKENIZER": "0"}, wait_ready=False)
    (entered,) = eventually(lambda: ledger.words(ledger_path, "entered"), 40)
    worker.signal(signal.SIGTERM)
    assert worker.wait_exit(40) == 0
    assert ledger.words(ledger_path, "left") == [[entered[0], "left", "Tokenizer"]]


def test_a_child_that_is_told_to_end_while_it_loads_leaves_what_has_entered(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("prefork", {"LOAD": "120", "LOAD_TOKENIZER": "0"}, wait_ready=False)
    (entered,) = eventually(lambda: ledger.words(ledger_path, "entered"), 40)
    os.kill(int(entered[0]), signal.SIGTERM)
    left = eventually(lambda: ledger.words(ledger_path, "left"), 20)
    assert left == [[entered[0], "left", "Tokenizer"]]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("body", ["leave", "fail"])
def test_what_is_no_exception_fails_its_task_and_the_process_goes_on(
    pool: str, body: str, start_served: StartServed, ledger_path: Path
) -> None:
    start_served(pool)
    classifier = served.Classifier()
    task = classifier.leave if body == "leave" else served.fail
    raised = {
        "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt",
        "panic": "Panic",
        "group": "BaseExceptionGroup",
        "close": "GeneratorExit",
        "cancel": "CancelledError",
    }
    for how, named in raised.items():
        with pytest.raises(errors.BodyExited, match=named) as caught:
            task.options(timeout=20).remote(how)
        assert "misdeeds.py" in str(caught.value.__cause__)
    assert classifier.loaded.options(timeout=20).remote() == "smallsmall"
    assert len(ledger.words(ledger_path, "loading")) == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_warm_shutdown_lets_a_synchronous_body_end(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    worker = start_served(pool)
    sent = served.Classifier().slow.delay(2.0)
    eventually(lambda: ledger.words(ledger_path, "began"))
    assert worker.stop() == 0
    assert sent.get(timeout=10) == "slow"


def test_a_cold_shutdown_gives_the_input_of_a_synchronous_body_to_the_next_worker(
    start_served: StartServed, ledger_path: Path
) -> None:
    worker = start_served("prefork")
    sent = served.Classifier().slow.delay(10.0)
    eventually(lambda: ledger.words(ledger_path, "began"))
    # Celery cancels what its main process knows to run, and waits for the end of what it does not.
    inspect = served.celery.control.inspect([worker.node])
    eventually(lambda: (inspect.active() or {}).get(worker.node))
    worker.signal(signal.SIGQUIT)
    worker.wait_exit(30)
    assert ledger.words(ledger_path, "ended") == []
    start_served("prefork")
    assert sent.get(timeout=30) == "slow"


def test_a_child_that_is_told_to_end_gives_its_synchronous_body_to_the_next(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("prefork")
    sent = served.Classifier().slow.delay(3.0)
    (began,) = eventually(lambda: ledger.words(ledger_path, "began"))
    os.kill(int(began[0]), signal.SIGTERM)
    assert sent.get(timeout=30) == "slow"
    assert len(ledger.words(ledger_path, "began")) == 2


def test_a_killed_child_is_replaced_by_one_that_loads_for_8_seconds(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("prefork", {"LOAD_AGAIN": "8"})
    first = served.who.remote()
    os.kill(first, signal.SIGKILL)
    second = served.who.options(timeout=40).remote()
    assert second != first
    entered = [line for line in ledger.words(ledger_path, "entered") if line[2] == "Model"]
    assert [int(line[0]) for line in entered] == [first, second]


def test_a_child_that_dies_with_an_input_gives_it_to_the_next(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("prefork")
    sent = served.record.delay("survivor", 1.0)
    (began,) = eventually(lambda: ledger.words(ledger_path, "began"))
    os.kill(int(began[0]), signal.SIGKILL)
    assert sent.get(timeout=30) == "survivor"
    assert len(ledger.words(ledger_path, "began")) == 2
    assert len(ledger.words(ledger_path, "ended")) == 1


@pytest.mark.parametrize("pool", ["threads", "eventlet", "gevent"])
def test_other_pools_are_refused_with_the_remedy(pool: str, start_served: StartServed) -> None:
    if pool != "threads":
        pytest.importorskip(pool)
    worker = start_served(pool, wait_ready=False)
    assert worker.wait_exit(40) != 0
    assert f"the pool {pool!r} cannot serve" in worker.log_text()
    assert "or with -P prefork or solo" in worker.log_text()


def test_the_threads_pool_runs_the_tasks_of_a_project_that_are_no_services(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("threads", queues="celery")
    assert served.plain.delay(1).get(timeout=20) == 2
    assert ledger.read(ledger_path) == []


def test_what_does_not_act_on_a_stock_pool_is_said_once(start_served: StartServed) -> None:
    worker = start_served("prefork", concurrency=2)
    text = worker.log_text()
    assert text.count("have no effect on the prefork pool") == 1
    assert "Classifier: concurrent, batched, min_workers" in text
    assert "square: benchmark" in text


def test_a_task_without_limit_that_redis_would_deliver_twice_is_said_once(
    start_served: StartServed,
) -> None:
    text = start_served("prefork", concurrency=2).log_text()
    assert (
        text.count(
            "tasks without a time limit: served.unlimited. Redis delivers an input a second time"
        )
        == 1
    )
    assert "broker_transport_options['visibility_timeout']=3600 s: declare timeout=" in text


@pytest.mark.parametrize("pool", POOLS)
def test_a_soft_limit_is_raised_inside_the_coroutine(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    start_served(pool)
    sent = served.rest.apply_async((30.0,), soft_time_limit=1, time_limit=20)
    assert sent.get(timeout=10) == "soft"
    assert len(ledger.words(ledger_path, "softly")) == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_hard_limit_fails_the_task_and_the_worker_goes_on(
    pool: str, start_served: StartServed, ledger_path: Path
) -> None:
    start_served(pool)
    sent = served.rest.apply_async((30.0,), time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        sent.get(timeout=15)
    assert served.square.options(timeout=20).remote(3) == 9
    if pool != "prefork":  # there the whole child is killed
        assert len(ledger.words(ledger_path, "cancelled")) == 1


def test_revoke_with_terminate_cancels_the_coroutine(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("prefork", concurrency=2)
    sent = served.rest.delay(30.0)
    neighbour = served.record.delay("neighbour", 2.0)
    eventually(lambda: len(ledger.words(ledger_path, "began")) == 2)
    sent.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=10)
    eventually(lambda: ledger.words(ledger_path, "cancelled"))
    assert neighbour.get(timeout=10) == "neighbour"
    assert served.square.options(timeout=20).remote(3) == 9


def test_a_family_expands_to_the_queues_of_its_services(start_served: StartServed) -> None:
    worker = start_served("solo")
    active = served.celery.control.inspect(destination=[worker.node]).active_queues()
    names = {queue["name"] for queue in active[worker.node]}
    assert {"cpu.square", "cpu.Classifier"} <= names
    assert "cpu" not in names


def test_one_service_queue_serves_that_service_alone(
    start_served: StartServed, ledger_path: Path
) -> None:
    start_served("solo", queues="cpu.square")
    assert served.square.options(timeout=20).remote(3) == 9
    assert ledger.words(ledger_path, "loading") == []
    with pytest.raises(errors.CallTimeout):
        served.echo.options(timeout=1).remote(1)


def test_an_unknown_family_is_refused_at_start(start_served: StartServed) -> None:
    worker = start_served("solo", queues="gpu.H100", wait_ready=False)
    assert worker.wait_exit(40) != 0
    assert "no service belongs to this family" in worker.log_text()


def test_a_queue_whose_service_is_not_loaded_is_refused_at_run_time(
    start_served: StartServed,
) -> None:
    worker = start_served("solo", queues="cpu.square")
    control = served.celery.control
    (answer,) = control.add_consumer("cpu.echo", destination=[worker.node], reply=True)
    assert "has not loaded its service" in answer[worker.node]["error"]
    (answer,) = control.add_consumer("other", destination=[worker.node], reply=True)
    assert answer[worker.node] == {"ok": "add consumer other"}


def test_a_body_awaits_another_service_of_its_process_without_a_message(
    start_served: StartServed,
) -> None:
    start_served("prefork")
    label = served.Classifier(threshold=0.1).label.remote(0.5)
    assert label == served.Label("positive", 0.25)


def test_prefork_does_not_fork_once_cuda_is_up(
    start_worker: StartWorker, ledger_path: Path, tmp_path: Path
) -> None:
    env = {"CUDA_UP": str(tmp_path), "LEDGER": str(ledger_path)}
    worker = start_worker("cudaed:celery", env=env, wait_ready=False)
    assert worker.wait_exit(40) == 78
    assert "CUDA is up in the worker's main process" in worker.log_text()
    assert ledger.read(ledger_path) == []


def test_a_child_that_was_forked_after_cuda_came_up_does_not_serve(
    start_worker: StartWorker, ledger_path: Path, tmp_path: Path
) -> None:
    up = tmp_path / "up"
    env = {"CUDA_UP": str(up), "LEDGER": str(ledger_path)}
    worker = start_worker("cudaed:celery", env=env)
    (pid,) = {int(line[0]) for line in ledger.words(ledger_path, "entered")}
    up.touch()
    os.kill(pid, signal.SIGKILL)
    assert worker.wait_exit(40) == 1
    assert "CUDA is up in the worker's main process" in worker.log_text()
    assert {int(line[0]) for line in ledger.words(ledger_path, "entered")} == {pid}


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ("content", "accept_content=['json'] lacks 'gw-json'"),
        ("results", "result_serializer='json' would change the types of answers"),
        ("visibility", "is not over the longest time limit, 300 s"),
        ("unknown", "did you mean 'gw_start_timeout'?"),
        ("type", "gw_start_timeout='soon': must be float over 0"),
    ],
)
def test_a_worker_refuses_a_configuration_that_cannot_work(
    wrong: str, remedy: str, start_worker: StartWorker, ledger_path: Path
) -> None:
    env = {"WRONG": wrong, "LEDGER": str(ledger_path)}
    worker = start_worker("misconfigured:celery", env=env, wait_ready=False)
    assert worker.wait_exit(40) == 78
    assert remedy in worker.log_text()
    assert ledger.read(ledger_path) == []
