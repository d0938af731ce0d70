"""Sizes the pool by its load; ``worker_autoscaler = "gw_celery.autoscale:Autoscaler"``."""

from __future__ import annotations

from gw_celery.autoscale.autoscaler import Autoscaler

__all__ = ["Autoscaler"]
