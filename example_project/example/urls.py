"""The project's routes."""

from __future__ import annotations

from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import include, path

urlpatterns = [
    path("", include("search.urls")),
    # Under DEBUG only: uvicorn, unlike runserver, serves no static files by itself.
    *staticfiles_urlpatterns(),
]
