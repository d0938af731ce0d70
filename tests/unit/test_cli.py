"""``celery gw ...`` as an operator types it, with workers whose answers are given."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result
from kombu import pidbox

from gw_celery.cluster import held


def gw(line: str, app: Any) -> Result:
    """The command that Celery loads as its plugin."""
    (command,) = entry_points(group="celery.commands", name="gw")
    return CliRunner().invoke(command.load(), line.split(), obj=SimpleNamespace(app=app))


# -- what workers answer: docs/gpu-pool.md and tests/goldens/control.json have it --


def worker(**given: Any) -> dict[str, Any]:
    return {"replicas": [], "waiting": 0, "open_queues": [], "closed_queues": [], **given}


def replica(number: int, state: str, **given: Any) -> dict[str, Any]:
    nothing = {"pid": None, "slots": 0, "in_flight": 0, "restarts": 0, "last_error": ""}
    return {"number": number, "state": state, **nothing, **given}


def probe(kind: str, name: str, **given: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "is_ok": None, "failures": 0, "detail": "", **given}


def score(**given: Any) -> dict[str, Any]:
    return {
        "value": None,
        "measured": None,
        "served": None,
        "drift": None,
        "benchmarks": [],
        **given,
    }


READY = replica(0, "ready", pid=4711, devices=["GPU-1", "GPU-2"], slots=8, in_flight=3, restarts=1)
FAILED = replica(1, "failed", restarts=4, last_error="no such model")
GPU = worker(
    replicas=[READY, FAILED],
    waiting=2,
    open_queues=["cpu.embed", "celery"],
    closed_queues=["cpu.classify"],
)


class Typed:
    """``celery gw ...``, with workers whose answers are given."""

    def __init__(self) -> None:
        self.workers: Any = None
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def broadcast(self, command: str, **given: Any) -> Any:
        self.sent.append((command, given))
        return self.workers

    def __call__(self, line: str, *workers: dict[str, Any]) -> Result:
        self.workers = list(workers) or self.workers
        return gw(line, SimpleNamespace(control=SimpleNamespace(broadcast=self.broadcast)))


@pytest.fixture
def typed() -> Typed:
    return Typed()


def test_a_replica_is_shown_with_the_last_answers_of_its_probes(typed: Typed) -> None:
    probes = [
        probe("startup", "Model.starts", is_ok=True, seconds=0.25),
        probe(
            "readiness",
            "Model.health",
            is_ok=False,
            failures=2,
            detail="returned False",
            seconds=3.0,
        ),
        probe("liveness", "Model.health"),
    ]
    unready = replica(0, "unready", pid=4711, slots=8, probes=probes)
    assert typed("status", {"gpu@host": worker(replicas=[unready])}).output.splitlines()[2:] == [
        "    startup probe Model.starts passed, in 0.25 s",
        "    readiness probe Model.health failed, 2 in a row, in 3 s: returned False",
        "    liveness probe Model.health has not answered yet",
    ]


def test_a_worker_is_shown_with_its_queues_and_replicas(typed: Typed) -> None:
    result = typed("status", {"gpu@host": GPU})
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "gpu@host: 2 waiting; consumes cpu.embed, celery; closed: cpu.classify",
        "  replica 0  ready     pid 4711  3/8 in flight  1 restarts  on GPU-1, GPU-2",
        "  replica 1  failed    pid -  0/0 in flight  4 restarts  no such model",
    ]


@pytest.mark.parametrize(
    ("outage", "shown"),
    [
        (
            {"outage": "ConnectionError(refused)"},
            ", results cannot be stored: ConnectionError(refused)",
        ),
        ({"broker_outage": "ReadOnlyError: no"}, ": ReadOnlyError: no"),
    ],
)
def test_a_worker_in_an_outage_says_why_it_takes_nothing(
    typed: Typed, outage: dict[str, str], shown: str
) -> None:
    assert typed("status", {"a@host": worker(**outage)}).output.splitlines() == [
        "a@host: 0 waiting; consumes nothing; closed: nothing",
        f"  consuming is paused{shown}",
    ]


def test_the_scores_of_a_worker_are_shown_with_where_they_come_from(typed: Typed) -> None:
    measured = {
        "task": "p.embed",
        "value": 480.0,
        "least": 450.0,
        "most": 495.0,
        "success_rate": 0.9,
        "p50": 0.0203,
        "p95": 0.031,
        "failure": "KeyError: 'x'",
        "age": 7300.0,
    }
    embed = score(value=300.0, measured=480.0, served=300.0, drift=-0.375, benchmarks=[measured])
    scores = {"": score(value=7.0, served=7.0), "p.embed": embed, "p.rank": score()}
    assert typed("status", {"a@host": worker(scores=scores)}).output.splitlines()[1:] == [
        "  plain tasks: 7/s a replica, as served; it has no benchmark",
        "  p.embed: 300/s a replica, as served; -38% from the benchmark's 480/s",
        "    p.embed: 480/s (450 to 495), p50 20.3 ms, p95 31 ms, 90% succeeded, measured 2 h "
        "ago; first failure: KeyError: 'x'",
    ]


def test_workers_are_shown_in_the_order_of_their_names(typed: Typed) -> None:
    idle = worker()
    result = typed("status", {"b@host": idle}, {"a@host": idle})
    assert result.output.splitlines() == [
        "a@host: 0 waiting; consumes nothing; closed: nothing",
        "b@host: 0 waiting; consumes nothing; closed: nothing",
    ]


@pytest.mark.parametrize(
    ("age", "said"), [(119.0, "119 s ago"), (3000.0, "50 min ago"), (86_400.0, "24 h ago")]
)
def test_the_age_of_a_benchmark_is_said_in_what_people_count_by(
    typed: Typed, age: float, said: str
) -> None:
    figures = {"task": "p.embed", "value": 4.0, "least": 4.0, "most": 4.0, "success_rate": 1.0}
    measured = {**figures, "p50": 0.02, "p95": 0.03, "failure": "", "age": age}
    embed = score(value=4.0, measured=4.0, benchmarks=[measured])
    output = typed("status", {"a@host": worker(scores={"p.embed": embed})}).output
    assert output.endswith(f"measured {said}\n")


def test_programs_get_one_json_document(typed: Typed) -> None:
    result = typed("status --json", {"gpu@host": GPU}, {"b@host": GPU})
    assert json.loads(result.output) == {"gpu@host": GPU, "b@host": GPU}


@pytest.mark.parametrize("workers", [None, []])
@pytest.mark.parametrize("line", ["status -t 0.5", "status --json --timeout 0.5"])
def test_a_status_without_an_answer_fails_and_says_what_to_look_at(
    typed: Typed, line: str, workers: Any
) -> None:
    typed.workers = workers
    result = typed(line)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: no worker with the GPU pool answered within 0.5 s: start one, or correct -A, which "
        "must name its app\n"
    )
    if "json" in line:
        assert json.loads(result.stdout) == {}, "programs can read it all the same"


@pytest.mark.parametrize(
    ("line", "command", "arguments"),
    [
        ("status", "gw_status", {}),
        ("drain", "gw_drain", {"replica": None}),
        ("drain 0", "gw_drain", {"replica": 0}),
        ("restart", "gw_restart", {"replica": None}),
        ("restart 3", "gw_restart", {"replica": 3}),
    ],
)
def test_each_command_asks_all_workers_once_and_waits_two_seconds(
    typed: Typed, line: str, command: str, arguments: dict[str, Any]
) -> None:
    typed(line)
    asked = {"arguments": arguments, "destination": None, "reply": True, "timeout": 2.0}
    assert typed.sent == [(command, asked)]


@pytest.mark.parametrize("name", ["status", "drain", "restart"])
def test_some_workers_can_be_named_and_waited_for(typed: Typed, name: str) -> None:
    typed(f"{name} -d a@host --destination b@host --timeout 7.5")
    ((_, asked),) = typed.sent
    assert (asked["destination"], asked["timeout"]) == (["a@host", "b@host"], 7.5)


@pytest.mark.parametrize("name", ["drain", "restart"])
def test_what_each_worker_said_is_shown(typed: Typed, name: str) -> None:
    said = {"ok": f"{name}: all replicas"}
    result = typed(name, {"b@host": said}, {"a@host": said})
    assert result.exit_code == 0
    assert result.output == f"a@host: {name}: all replicas\nb@host: {name}: all replicas\n"


def test_one_refusal_makes_the_command_fail(typed: Typed) -> None:
    refusal = {"error": "there is no replica 7: this worker has replicas 0 to 1"}
    result = typed("drain 7", {"a@host": refusal}, {"b@host": {"ok": "drain: replica 7"}})
    assert result.exit_code == 1
    assert result.stdout == f"a@host: {refusal['error']}\nb@host: drain: replica 7\n"
    assert result.stderr == "Error: a worker refused\n"


@pytest.mark.parametrize("name", ["drain", "restart"])
def test_a_command_without_an_answer_fails(typed: Typed, name: str) -> None:
    result = typed(name)
    assert (result.exit_code, result.stderr) == (1, "Error: no worker answered\n")


@pytest.mark.parametrize("line", ["drain all", "restart 1.5", "status now", "drain 1 2"])
def test_what_is_no_replica_is_refused_before_anything_is_sent(typed: Typed, line: str) -> None:
    assert typed(line).exit_code == 2
    assert typed.sent == []


# -- workers without the GPU pool in the same cluster --


def web(command: str) -> dict[str, Any]:
    """What a worker answers that has no such command."""
    return {"web@host": pidbox.Mailbox("celery").Node("web@host").dispatch(command)}


@pytest.mark.parametrize("name", ["drain", "restart"])
def test_workers_without_the_gpu_pool_are_not_in_the_way(typed: Typed, name: str) -> None:
    result = typed(name, {"gpu@host": {"ok": f"{name}: all replicas"}}, web(f"gw_{name}"))
    assert result.exit_code == 0
    assert result.output == f"gpu@host: {name}: all replicas\n"


@pytest.mark.parametrize("line", ["status", "status --json", "drain", "restart 0"])
def test_answers_of_workers_without_the_gpu_pool_do_not_count(typed: Typed, line: str) -> None:
    result = typed(line, web(f"gw_{line.split()[0]}"))
    assert result.exit_code == 1
    assert "answered" in result.stderr
    assert "web@host" not in result.output


def test_without_a_dead_letter_queue_the_command_says_which_setting_it_is() -> None:
    app = SimpleNamespace(conf={"gw_dead_letter_queue": None})
    result = gw("dead", app)
    assert result.exit_code == 1
    assert "gw_dead_letter_queue is None" in result.stderr


def test_the_autoscaler_says_how_many_it_wants_and_why(typed: Typed) -> None:
    scaling = {"least": 1, "most": 4, "desired": 3, "actual": 2, "why": "embed needs 2.50"}
    result = typed("status", {"gpu@host": GPU | {"scaling": scaling}})
    assert (
        "  autoscaler: 2 replicas, 3 wanted, 1 to 4: embed needs 2.50" in result.output.splitlines()
    )


@pytest.mark.parametrize("options", ["", " --reclaim"])
def test_a_name_in_redis_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    name = "odd\x9b2J@h:1.0"
    entry = held.Held(incarnation=name, messages=3, silent=None, is_lost=False)
    holders = SimpleNamespace(listed=lambda: [entry], reclaim=lambda: {name: 3})
    monkeypatch.setattr(held, "holders", lambda app, ttl: holders)
    with Celery("shop", broker="memory://", set_as_current=False) as app:
        shown = gw(f"holds{options}", app)
    assert shown.exit_code == 0
    assert "\x9b" not in shown.output
    assert "@h:1.0: 3 messages; has no heartbeat" in shown.output
    assert ("3 messages are back in their queues" in shown.output) == bool(options)
