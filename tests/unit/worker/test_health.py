from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gw_celery import conf, errors
from gw_celery.protocol import snapshot
from gw_celery.worker import health
from tests.processes import eventually

READY = snapshot.Replica(number=0, state="ready", pid=12)
LOADING = snapshot.Replica(number=1, state="entering", pid=13, seconds_in_state=4.2)
ILL = snapshot.Replica(
    number=2,
    state="unready",
    pid=14,
    probes=(
        snapshot.Probe(name="Model.health", kind="readiness", is_ok=False, detail="returned False"),
        snapshot.Probe(name="Model.lives", kind="liveness", is_ok=True),
    ),
)
DEAD = snapshot.Replica(number=3, state="failed", last_error="OSError: no weights")


def worker(**parts: Any) -> snapshot.Worker:
    return snapshot.Worker(hostname="gpu@host", **({"desired": 1} | parts))


PROBES = ("/livez", "/readyz", "/startupz")
SERVES = worker(replicas=(READY,), ready_slots={"proj.Model": 4, "": 1})


def made(**settings: Any) -> health.Health:
    return health.Health(conf.Settings(**settings), {"gpu.Model": "proj.Model"})


@contextmanager
def running(**settings: Any) -> Iterator[health.Health]:
    signs = made(**settings)
    signs.start()
    try:
        yield signs
    finally:
        signs.close()


def fetched(signs: health.Health, path: str) -> tuple[int, str, str]:
    """The status, the content type and the body of an answer."""
    try:
        with urllib.request.urlopen(signs.address + path, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def ask(signs: health.Health, path: str) -> tuple[int, dict[str, Any]]:
    status, _, body = fetched(signs, path)
    return status, json.loads(body)


def age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


# -- ready --


def test_a_worker_is_ready_when_each_of_its_services_is_ready_somewhere() -> None:
    assert health.is_ready(SERVES) == health.Verdict(is_ok=True)
    slots = {"proj.Model": 4, "proj.other": 0, "": 1}
    verdict = health.is_ready(worker(replicas=(READY, ILL), ready_slots=slots))
    assert verdict == health.Verdict(is_ok=False, why=("no replica is ready for proj.other",))


def test_a_worker_of_plain_tasks_is_ready_with_any_replica() -> None:
    assert health.is_ready(worker(ready_slots={"": 1})).is_ok
    assert not health.is_ready(worker(ready_slots={"": 0})).is_ok


def test_a_worker_that_is_scaled_to_zero_is_ready_and_one_that_stops_is_not() -> None:
    nothing = {"proj.Model": 0, "": 0}
    assert health.is_ready(worker(ready_slots=nothing, desired=0)).is_ok
    stops = worker(replicas=(READY,), ready_slots={"": 1}, is_stopping=True)
    assert health.is_ready(stops) == health.Verdict(is_ok=False, why=("the worker stops",))


def test_a_result_backend_that_is_away_is_told_and_no_failure() -> None:
    away = worker(ready_slots={"": 1}, outage="Redis does not answer")
    assert health.is_ready(away) == health.Verdict(is_ok=True, why=("Redis does not answer",))


def test_a_replica_says_what_keeps_it_from_inputs() -> None:
    assert health.why_not(READY) == ""
    assert health.why_not(LOADING) == "entering for 4 s"
    assert "unready for 0 s; readiness probe Model.health: returned False" in health.why_not(ILL)
    assert health.why_not(DEAD) == "failed for 0 s; OSError: no weights"


# -- over HTTP --


def test_each_path_answers_from_the_last_picture_with_the_reasons() -> None:
    with running(health_port=0) as signs:
        signs.beat(worker(replicas=(LOADING,), ready_slots={"": 0}))
        assert ask(signs, "/livez")[0] == 200
        status, said = ask(signs, "/startupz")
        assert (status, said["why"]) == (503, ["no replica has been ready yet"])
        assert said["replicas"] == [
            {"number": 1, "state": "entering", "pid": 13, "why": "entering for 4 s"}
        ]
        assert ask(signs, "/readyz")[0] == 503
        signs.beat(SERVES)
        assert [ask(signs, path)[0] for path in PROBES] == [200, 200, 200]
        signs.beat(worker(replicas=(DEAD,), ready_slots={"": 0}))
        assert [ask(signs, path)[0] for path in ("/livez", "/readyz", "/startupz")] == [
            200,
            503,
            200,
        ]


def test_a_loop_that_does_not_turn_is_dead_unless_it_waits_for_the_broker() -> None:
    with running(health_port=0, heartbeat_timeout=0.2) as signs:
        signs.beat(SERVES)
        status, said = eventually(
            lambda: answer if (answer := ask(signs, "/livez"))[0] == 503 else None
        )
        assert "loop has not turned for" in said["why"][0]
        with signs.connecting():
            status, said = ask(signs, "/livez")
            assert (status, said["why"]) == (200, ["connects to the broker for 0 s"])
        assert ask(signs, "/livez")[0] == 200


def test_a_scrape_shows_what_the_loop_saw_last() -> None:
    shown = 'gw_ready_slots{queue="gpu.Model",service="proj.Model"} '
    with running(health_port=0) as signs:
        signs.beat(SERVES)
        status, content_type, page = fetched(signs, "/metrics")
        assert (status, content_type[:25]) == (200, "text/plain; version=0.0.4")
        assert f"{shown}4.0" in page
        signs.beat(worker(ready_slots={"proj.Model": 8}))
        assert f"{shown}8.0" in fetched(signs, "/metrics")[2]


def test_without_prometheus_client_a_scrape_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "gw_celery.contrib.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with running(health_port=0) as signs:
        status, _, page = fetched(signs, "/metrics")
    assert status == 501
    assert "pip install 'gw-celery[metrics]'" in page


# -- the file --


def test_the_file_is_young_while_the_loop_turns_and_gone_after_a_clean_stop(
    tmp_path: Path,
) -> None:
    file = tmp_path / "alive"
    with running(heartbeat_file=str(file)) as signs:
        for _ in range(2):
            os.utime(file, (0, 0))

            def is_young() -> bool:
                signs.beat(SERVES)
                return age(file) < 60

            eventually(is_young, 10)
    assert not file.exists()


def test_the_file_grows_old_when_the_loop_hangs_and_not_while_it_waits_for_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_FRESH", -1.0)  # the loop was never heard of in time
    file = tmp_path / "alive"
    with running(heartbeat_file=str(file), health_port=0) as signs:
        os.utime(file, (0, 0))
        time.sleep(2.5)  # the thread looks at the file once a second
        assert age(file) > 1000
        with signs.connecting():
            eventually(lambda: age(file) < 60, 10)


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    signs = made(heartbeat_file=str(tmp_path / "no" / "alive"))
    with pytest.raises(errors.ConfigurationError, match=r"gw_heartbeat_file=.*cannot be written"):
        signs.start()


def test_a_file_that_cannot_be_touched_any_more_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "alive"
    with running(heartbeat_file=str(file)) as signs:
        folder.rename(tmp_path / "away")
        signs.beat(SERVES)
        eventually(lambda: "cannot be touched" in caplog.text, 10)
        time.sleep(2.2)  # the next two tries fail, too
        assert caplog.text.count("it is tried again") == 1
        folder.mkdir()
        signs.beat(SERVES)
        eventually(file.exists, 10)


def test_nothing_is_started_where_nothing_is_configured() -> None:
    with running() as signs:
        assert (signs.address, signs._thread) == ("", None)


@pytest.mark.parametrize("value", [-1, 65536, True, "80", 80.0])
def test_a_port_is_a_port(value: object) -> None:
    with pytest.raises(errors.ConfigurationError, match="gw_health_port"):
        conf.read({"gw_health_port": value})
    assert conf.read({"gw_health_port": 0}).health_port == 0
