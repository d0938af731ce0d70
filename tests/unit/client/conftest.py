from __future__ import annotations

from typing import Any

import pytest
from celery import Celery


@pytest.fixture
def sent(celery_app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The headers of everything that ``celery_app`` publishes."""
    published: list[dict[str, Any]] = []
    send = celery_app.amqp.send_task_message

    def note(producer: Any, name: str, message: Any, headers: Any = None, **given: Any) -> Any:
        published.append({**message.headers, **(headers or {})})
        return send(producer, name, message, headers=headers, **given)

    monkeypatch.setattr(celery_app.amqp, "send_task_message", note)
    return published
