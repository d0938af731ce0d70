"""The GPU pool: a Celery worker pool of replicas; ``worker_pool = "gw_celery.pool:TaskPool"``."""

from __future__ import annotations

from gw_celery.pool.taskpool import TaskPool

__all__ = ["TaskPool"]
