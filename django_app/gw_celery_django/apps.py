"""The app config: it presets the project's Celery app."""

from __future__ import annotations

from celery import current_app
from django.apps import AppConfig

import gw_celery
from gw_celery import errors
from gw_celery_django import checks, settings


class GWCeleryConfig(AppConfig):
    """Add ``gw_celery_django`` to ``INSTALLED_APPS`` to use it."""

    name = "gw_celery_django"
    label = "gw_celery"
    verbose_name = "GPU model serving"

    def ready(self) -> None:
        checks.register_all()
        try:
            settings.apply(current_app)
        except errors.ConfigurationError:
            return  # the system check reports it, and a worker refuses to start
        gw_celery.preset(current_app)
