"""The project's Celery app, set up as Celery's Django guide has it."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example.settings")

app = Celery("example")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@worker_init.connect
def wait_for_the_server(**kwargs: Any) -> None:
    """Give workers Celery's own patience: an answer must outlast a restart of the server."""
    app.conf.result_backend_transport_options = {}
