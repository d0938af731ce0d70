"""Doubles for tests with any test runner; ``gw_celery.testing.fixtures`` adapts them to pytest."""

from __future__ import annotations

from gw_celery.devserver import Server
from gw_celery.devserver import running as server
from gw_celery.testing.serving import FakeClock, in_process
from gw_celery.testing.workers import Process, Worker, eventually, is_alive, worker

__all__ = [
    "FakeClock",
    "Process",
    "Server",
    "Worker",
    "eventually",
    "in_process",
    "is_alive",
    "server",
    "worker",
]
