"""A Django project in one module, whose beat keeps its schedule in the database.

Environment: ``DECLARED`` is what there is of ``probe`` and ``benchmark``; ``PROBE_PERIOD`` seconds.
"""

from __future__ import annotations

import os
from typing import Any

SECRET_KEY = "for tests only"
INSTALLED_APPS = ["django_celery_beat", "gw_celery_django"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", ":memory:"),
        "OPTIONS": {"timeout": 20},
    }
}
USE_TZ = True
GW_CELERY = {"probe_period": float(os.environ.get("PROBE_PERIOD", "10"))}
CELERY_BEAT_SCHEDULE = {"mail": {"task": "mail", "schedule": 3600.0}}
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "ticked_django")


def _app() -> Any:
    # Here, because Django imports this module as its settings.
    from celery import Celery

    app = Celery("ticked_django")
    app.config_from_object("ticked_django", namespace="CELERY")
    return app


celery = _app()


def declare() -> None:
    """Declare as a module does that is found after the app is made."""
    import gw_celery as gw

    app = gw.App("ticked_django", celery)
    declared = os.environ.get("DECLARED", "probe,benchmark").split(",")
    probes = [gw.Probe.on("check", period_s=60)] if "probe" in declared else []

    class Watched:
        @gw.method(benchmark_dataset=[{}] if "benchmark" in declared else None)
        def check(self) -> bool:
            return True

    app.cls(probes=probes)(Watched)


if os.environ.get("DECLARED") != "no app":
    declare()
