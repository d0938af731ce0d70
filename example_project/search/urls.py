"""The page and the JSON API."""

from __future__ import annotations

from django.urls import path

from search import api, views

urlpatterns = [
    path("", views.page, name="page"),
    path("healthz", api.healthz, name="healthz"),
    path("api/documents/", api.documents, name="documents"),
    path("api/search/", api.search, name="search"),
    path("api/ask/", api.ask, name="ask"),
    path("api/tasks/<uuid:task_id>/", api.task, name="task"),
]
