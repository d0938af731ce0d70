"""Settings of the example project: a local SQLite file, a Redis or Valkey server, no accounts."""

from __future__ import annotations

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

DEBUG = os.environ.get("EXAMPLE_DEBUG", "1") == "1"
# Good enough for a page on this machine; a project that anyone can reach needs its own.
SECRET_KEY = os.environ.get("EXAMPLE_SECRET_KEY", "insecure-key-of-the-local-example-project")
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.staticfiles",
    # Its AppConfig fills what this file leaves unset in Celery's configuration.
    "gw_celery_django",
    "search",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "search.middleware.content_security_policy",
    "django.middleware.common.CommonMiddleware",
    "search.middleware.BrowserCsrfMiddleware",
    "search.middleware.ApiErrorMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "example.urls"
ASGI_APPLICATION = "example.asgi.application"
WSGI_APPLICATION = "example.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("EXAMPLE_DB", BASE_DIR / "db.sqlite3"),
        # Django and two workers write to one file. With the write-ahead log readers never wait;
        # a writer waits its turn, and takes its lock at the start, where waiting is possible.
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"

# The page takes its token from the form, so that no script has to read the cookie.
CSRF_COOKIE_HTTPONLY = True
CSRF_COOKIE_SAMESITE = "Strict"

CELERY_BROKER_URL = os.environ.get("EXAMPLE_BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_RESULT_BACKEND = os.environ.get("EXAMPLE_RESULT_URL", "redis://127.0.0.1:6379/1")
# The page tells "queued" from "running".
CELERY_TASK_TRACK_STARTED = True
CELERY_RESULT_EXPIRES = 3600
# One copy of the model, whatever the number of processor cores.
GW_CELERY = {"replicas": 1}
# A visitor hears within seconds that the server is down; by Celery's default it would take 19.
CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS = {"retry_policy": {"timeout": 1.0}}
CELERY_REDIS_SOCKET_CONNECT_TIMEOUT = 2
