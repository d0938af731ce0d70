"""The GPU pool, in the worker's parent process: ``worker_pool = "gw_celery.pool:TaskPool"``."""

from __future__ import annotations

from gw_celery.pool.taskpool import TaskPool

__all__ = ["TaskPool"]
