"""Doubles for the tests of your tasks, with any test runner; ``fixtures`` has them for pytest."""

from __future__ import annotations

from gw_celery.devserver import Server
from gw_celery.devserver import running as server
from gw_celery.testing.clock import FakeClock
from gw_celery.testing.processes import Process, eventually, is_alive
from gw_celery.testing.serving import in_process
from gw_celery.testing.workers import Worker, worker

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
