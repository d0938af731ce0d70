from __future__ import annotations

import types
from pathlib import Path

import pytest

from gw_celery import errors, signals
from gw_celery.worker import startup


def refuse(*_: object) -> None:
    raise errors.ConfigurationError("no GPU here: set GW_FAKE_GPUS")


def test_a_refused_worker_leaves_its_reason_where_it_would_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detached, its terminal is gone, and Celery has not set up logging yet."""
    monkeypatch.setattr(startup, "prepare", refuse)
    log = tmp_path / "worker.log"
    with pytest.raises(SystemExit) as caught:
        signals._on_worker_init(types.SimpleNamespace(logfile=str(log)))
    assert caught.value.code == 78
    assert "no GPU here: set GW_FAKE_GPUS" in log.read_text()


@pytest.mark.parametrize("logfile", [None, "/nowhere/at/all/worker.log", "%n%I.log"])
def test_a_log_that_cannot_be_written_is_no_obstacle(
    logfile: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "prepare", refuse)
    with pytest.raises(SystemExit):
        signals._on_worker_init(types.SimpleNamespace(logfile=logfile))
