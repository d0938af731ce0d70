"""The app config, which configures the project's Celery app when Django starts."""

from __future__ import annotations

import contextlib

from celery import current_app
from django.apps import AppConfig

import gw_celery
from gw_celery import errors
from gw_celery_django import checks, settings


class GWCeleryConfig(AppConfig):
    """The app config; add ``gw_celery_django`` to ``INSTALLED_APPS`` to use it."""

    name = "gw_celery_django"
    label = "gw_celery"
    verbose_name = "GPU model serving"

    def ready(self) -> None:
        """Register the checks, apply ``GW_CELERY`` and preset the Celery app; Django calls it."""
        checks.register_all()
        # The system checks report errors, and a worker refuses to start with them.
        with contextlib.suppress(errors.ConfigurationError):
            settings.apply(current_app)
        with contextlib.suppress(errors.ConfigurationError):
            gw_celery.preset(current_app)
