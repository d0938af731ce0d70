"""Doubles for the tests of your tasks, with any test runner; ``fixtures`` has them for pytest."""

from __future__ import annotations

from gw_celery.testing.clock import FakeClock
from gw_celery.testing.processes import Process, eventually, is_alive
from gw_celery.testing.serving import in_process
from gw_celery.testing.workers import Worker, worker

__all__ = [
    "FakeClock",
    "Process",
    "Worker",
    "eventually",
    "in_process",
    "is_alive",
    "worker",
]
