"""System checks: ``manage.py check`` reports what would fail at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery import current_app
from django.core import checks

from gw_celery import errors
from gw_celery.client import preset
from gw_celery_django import settings

#: Result backends that notify a waiting client; others are polled.
_NOTIFYING = ("RedisBackend", "SentinelBackend", "RPCBackend")


def register_all() -> None:
    """Register the checks; the app config calls this when Django's apps are ready."""
    checks.register(check_settings, "gw_celery")
    checks.register(check_celery_app, "gw_celery")
    checks.register(check_content, "gw_celery")
    checks.register(check_tls, "gw_celery")
    checks.register(check_backend, "gw_celery")


def check_settings(**_: Any) -> Sequence[checks.CheckMessage]:
    """Check that ``GW_CELERY`` has only known keys with valid values (E001)."""
    return _errors("gw_celery.E001", lambda: settings.apply(current_app))


def check_celery_app(**_: Any) -> Sequence[checks.CheckMessage]:
    """Check that Django's processes use the project's Celery app (E002)."""
    if current_app.main != "default" and current_app.conf.broker_url:
        return []
    return [
        checks.Error(
            "Celery's current app is not the project's: tasks would be sent to Celery's default "
            "broker.",
            hint="Import the app in the project package: from .celery import app as celery_app",
            id="gw_celery.E002",
        )
    ]


def check_content(**_: Any) -> Sequence[checks.CheckMessage]:
    """Check that messages and results of our tasks are accepted (E003)."""
    if check_settings():
        return []  # the Celery app is not preset because of them
    return _errors("gw_celery.E003", lambda: preset.require_content(current_app))


def check_tls(**_: Any) -> Sequence[checks.CheckMessage]:
    """Check that TLS connections verify the broker and the result backend (E004)."""
    if check_settings():
        return []  # they say whether this is allowed
    return _errors("gw_celery.E004", lambda: preset.require_verified_tls(current_app))


def check_backend(**_: Any) -> Sequence[checks.CheckMessage]:
    """Warn if the result backend cannot notify a waiting view of a finished task (W001)."""
    backend = type(current_app.backend).__name__
    if backend == "DisabledBackend":
        hint = "Set CELERY_RESULT_BACKEND, for example to redis://localhost/1"
        message = "There is no result backend: answers of tasks cannot be read."
    elif backend in _NOTIFYING:
        return []
    else:
        hint = "Use Redis as CELERY_RESULT_BACKEND, or call awaited tasks rarely."
        message = (
            f"{backend} cannot notify: each awaited answer is found by asking, half a second "
            f"apart (gw_poll_interval)."
        )
    return [checks.Warning(message, hint=hint, id="gw_celery.W001")]


def _errors(code: str, check: Callable[[], None]) -> Sequence[checks.CheckMessage]:
    try:
        check()
    except errors.ConfigurationError as exc:
        return [checks.Error(str(exc), id=code)]
    return []
