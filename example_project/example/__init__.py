"""A Django project whose views are answered by a model in a Celery worker."""

from __future__ import annotations

# Loaded with Django, so that tasks bind to this Celery app in web processes too.
from example.celery import app as celery_app

__all__ = ["celery_app"]
