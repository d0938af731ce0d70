"""Environment: ``DATABASE`` is the path of an SQLite file, or the name of a PostgreSQL database;
``WORKER_POOL`` is the pool of its workers.
"""

from __future__ import annotations

import os

SECRET_KEY = "for tests only"
ALLOWED_HOSTS = ["testserver"]
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django_celery_results",
    "gw_celery_django",
    "djangoed_shop",
]
ROOT_URLCONF = "djangoed_shop.views"
DATABASE = os.environ["DATABASE"]
if "/" in DATABASE:
    OPTIONS = {
        "ENGINE": "django.db.backends.sqlite3",
        "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE"},
    }
else:
    OPTIONS = {"ENGINE": "django.db.backends.postgresql", "HOST": "127.0.0.1"}
    OPTIONS |= {"USER": os.environ.get("PGUSER", "postgres")}
DATABASES = {"default": {**OPTIONS, "NAME": DATABASE}}
USE_TZ = True

# Celery's own variable would name the Redis of the other tests.
os.environ.pop("CELERY_RESULT_BACKEND", None)
CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
CELERY_WORKER_POOL = os.environ.get("WORKER_POOL", "gw_celery.pool:TaskPool")
GW_CELERY = {"poll_interval": 0.1, "call_timeout": 20.0, "max_payload_bytes": 100_000}
