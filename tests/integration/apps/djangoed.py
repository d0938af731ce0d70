"""A Django project in one module, whose results are stored in its database: settings and tasks."""

from __future__ import annotations

import asyncio
import os
from typing import Any

SECRET_KEY = "for tests only"
INSTALLED_APPS = ["django_celery_results", "django.contrib.contenttypes"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", ":memory:"),
        "OPTIONS": {"timeout": 20},
    }
}
USE_TZ = True
CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
CELERY_WORKER_POOL = "gw_celery.pool:TaskPool"
# Celery's own variable would name the Redis of the other tests.
os.environ.pop("CELERY_RESULT_BACKEND", None)
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "djangoed")


def _app() -> tuple[Any, Any]:
    # Here, because Django imports this module as its settings.
    from celery import Celery

    import gw_celery as gw

    app = Celery("djangoed", set_as_current=False)
    app.config_from_object("djangoed", namespace="CELERY")
    gw.preset(app)
    return app, gw.App("djangoed", app)


celery, serving = _app()


@serving.remote(queue="djangoed")
async def count_tables(nap: float = 0.0) -> int:
    """Ask the database from an asynchronous body, as Django's own documentation does."""
    from asgiref.sync import sync_to_async

    await asyncio.sleep(nap)
    return await sync_to_async(_count)()


@celery.task(queue="djangoed")
def count_tables_plainly() -> int:
    return _count()


def _count() -> int:
    from django.db import connection

    return len(connection.introspection.table_names())


@celery.task(queue="djangoed")
def fail() -> None:
    raise LookupError("nothing there")
