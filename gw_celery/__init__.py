"""gw_celery serves models on GPUs with Celery. This module exports the public names."""

from __future__ import annotations

from gw_celery.app import App
from gw_celery.client.execution import current_batch, hold_id
from gw_celery.client.preset import preset
from gw_celery.codec import register_type
from gw_celery.declare.gpu import Gpu
from gw_celery.declare.markers import batched, concurrent, method, on_enter, on_exit
from gw_celery.declare.parameters import parameter
from gw_celery.declare.probes import Probe
from gw_celery.errors import (
    BlockingCallError,
    BodyExited,
    CallTimeout,
    ConfigurationError,
    ContextLookupError,
    DeclarationError,
    GWCeleryError,
    NotServedError,
    QueueTimeExceeded,
    RemoteTaskError,
    RemoteTraceback,
    SerializationError,
    ServerFailed,
    ServerNotFound,
    StartupError,
    UsageError,
)

__version__ = "0.1.0"

__all__ = [
    "App",
    "BlockingCallError",
    "BodyExited",
    "CallTimeout",
    "ConfigurationError",
    "ContextLookupError",
    "DeclarationError",
    "GWCeleryError",
    "Gpu",
    "NotServedError",
    "Probe",
    "QueueTimeExceeded",
    "RemoteTaskError",
    "RemoteTraceback",
    "SerializationError",
    "ServerFailed",
    "ServerNotFound",
    "StartupError",
    "UsageError",
    "batched",
    "concurrent",
    "current_batch",
    "hold_id",
    "method",
    "on_enter",
    "on_exit",
    "parameter",
    "preset",
    "register_type",
]
