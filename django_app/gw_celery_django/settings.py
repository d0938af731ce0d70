"""Reads Django's setting ``GW_CELERY = {"start_timeout": 900, ...}``; no other module does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import django.conf

from gw_celery import conf, errors


def apply(app: Any) -> None:
    """Check ``GW_CELERY``, and copy its values into the configuration of the Celery app.

    Args:
        app: the Celery app, which is changed in place.

    Raises:
        ConfigurationError: if it is not a dict, for an unknown key or an invalid value, or if
            ``app.conf.gw_<key>`` has a different value.
    """
    values = getattr(django.conf.settings, "GW_CELERY", {})
    if not isinstance(values, Mapping):
        raise errors.ConfigurationError(
            f"GW_CELERY={values!r}: must be a dict of setting names, such as "
            f'{{"start_timeout": 900}}'
        )
    for name, value in values.items():
        key = f"{conf.PREFIX}{name}"
        if app.conf.get(key, value) != value:
            raise errors.ConfigurationError(
                f"GW_CELERY[{name!r}]={value!r} and app.conf.{key}={app.conf[key]!r} contradict "
                f"each other: keep one"
            )
        # Also a wrong value: a worker, which runs no system checks, then refuses to start.
        app.conf[key] = value
    conf.from_mapping(values)
    conf.read(app.conf)
