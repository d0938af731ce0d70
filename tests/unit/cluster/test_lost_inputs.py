"""What a worker does once about a lost one, however often storing its failures is tried."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.backends.redis import RedisBackend

from gw_celery import devserver
from gw_celery.cluster import early_acks, lost_inputs

START = "lost@h:1"


def test_what_a_lost_worker_runs_after_it_woke_up_is_not_taken_from_it(
    gw_broker: devserver.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    with Celery(broker="memory://", backend=gw_broker.result_url, set_as_current=False) as app:
        client, records = app.backend.client, early_acks.records_key(app.backend, START)
        living = lost_inputs.LostInputs(app, "living@h:2")
        monkeypatch.setattr(living, "start", lambda: None)
        client.hset(records, "1", early_acks.write({"id": "a", "task": "t"}, None))
        with monkeypatch.context() as patch:
            patch.setattr(RedisBackend, "mark_as_failure", refuse)
            living.take(f"{START}.0")
            living.run_round()
        client.hset(records, "2", early_acks.write({"id": "b", "task": "t"}, None))
        living.take(f"{START}.0")  # as it is among those that beat until this is done
        living.run_round()
        assert list(living.answered) == [f"{START}.0"]
        assert app.AsyncResult("a").state == "FAILURE"
        assert app.AsyncResult("b").state == "PENDING"
        assert client.hexists(records, "2")
