"""Sizing the pool by its load; ``worker_autoscaler = "gw_celery.autoscale:Autoscaler"``."""

from __future__ import annotations

from typing import Any

__all__ = ["Autoscaler"]


def __getattr__(name: str) -> Any:
    """Import Celery's worker when a worker asks for its autoscaler: a simulation needs none."""
    if name != "Autoscaler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gw_celery.autoscale.autoscaler import Autoscaler

    return Autoscaler
