"""A Django project as docs/django.md says, whose results are stored in its database."""

from __future__ import annotations

from .celery import app as celery_app

__all__ = ["celery_app"]
