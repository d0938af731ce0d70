"""gw-json, in every process: JSON that keeps Python types, and executes nothing from a message."""

from __future__ import annotations

from gw_celery.codec.serializer import (
    CONTENT_TYPE,
    NAME,
    Codec,
    Limits,
    checked,
    configure,
    dumps,
    loads,
    register,
)
from gw_celery.codec.types import (
    TypeRegistry,
    exception_class,
    register_annotations,
    register_type,
    registry,
)

__all__ = [
    "CONTENT_TYPE",
    "NAME",
    "Codec",
    "Limits",
    "TypeRegistry",
    "checked",
    "configure",
    "dumps",
    "exception_class",
    "loads",
    "register",
    "register_annotations",
    "register_type",
    "registry",
]
