"""The app's registration with Django."""

from __future__ import annotations

from django.apps import AppConfig


class SearchConfig(AppConfig):
    """A library of short texts that is searched by meaning."""

    name = "search"
