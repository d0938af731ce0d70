"""The Celery configuration that our tasks need, in every process, and checks for conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gw_celery import codec, conf, errors
from gw_celery.declare import registry

#: Seconds added to the longest time limit before Redis redelivers a message.
_MARGIN = 600
_DEFAULT_VISIBILITY = 3600


def preset(app: Any) -> None:
    """Set the Celery options that our tasks need, wherever the user kept Celery's default.

    It sets the accepted content, the result serializer, and broker retries at start-up. It is safe
    in every process. In Django the app config calls it.

    Args:
        app: the Celery app, which is changed in place.

    Raises:
        ConfigurationError: for an unknown ``gw_*`` setting, or one with a wrong type or value.
    """
    codec.register()
    configure_codec(conf.read(app.conf))
    defaults: dict[str, Any] = {
        "accept_content": [codec.NAME, "json"],
        "result_serializer": codec.NAME,
        "broker_connection_retry_on_startup": True,
    }
    for name, value in defaults.items():
        if not conf.is_set(app.conf, name):
            app.conf[name] = value


def configure_codec(settings: conf.Settings) -> None:
    """Apply the limits of gw-json from the settings."""
    codec.configure(
        codec.Limits(
            depth=settings.max_payload_depth,
            size=settings.max_payload_bytes,
            values=settings.max_payload_values,
        )
    )


def require_content(app: Any) -> None:
    """Check that messages and results of our tasks are accepted.

    Raises:
        ConfigurationError: if not, with the setting to change.
    """
    for name in ("accept_content", "result_accept_content"):
        accepted = app.conf[name]
        if accepted is not None and not {codec.NAME, codec.CONTENT_TYPE} & set(accepted):
            raise errors.ConfigurationError(
                f"{name}={list(accepted)!r} lacks {codec.NAME!r}, the serializer of our tasks: "
                f"call gw_celery.preset(app), or add it"
            )
    if app.conf.result_serializer != codec.NAME:
        raise errors.ConfigurationError(
            f"result_serializer={app.conf.result_serializer!r} would change the types of answers: "
            f"call gw_celery.preset(app), or set result_serializer={codec.NAME!r}"
        )


def require_visibility(app: Any, registries: Sequence[registry.Registry]) -> None:
    """Check the time after which Redis redelivers a message of a pool of Celery's own.

    A default that is too short is raised.

    Raises:
        ConfigurationError: if the user's value is not a number, or a task may run longer: it would
            run twice.
    """
    services = [service for declared in registries for service in declared.services.values()]
    names = [method.task_name for service in services for method in service.methods.values()]
    limits = [app.tasks[name].time_limit for name in names if name in app.tasks]
    longest = max((float(limit) for limit in limits if limit), default=0.0)
    options = dict(app.conf.broker_transport_options or {})
    visible = options.get("visibility_timeout", _DEFAULT_VISIBILITY)
    if isinstance(visible, bool) or not isinstance(visible, int | float):
        raise errors.ConfigurationError(
            f"broker_transport_options['visibility_timeout']={visible!r}: must be seconds, a number"
        )
    if longest < visible:
        return
    if visible != _DEFAULT_VISIBILITY:
        raise errors.ConfigurationError(
            f"broker_transport_options['visibility_timeout']={visible} is not over the longest "
            f"time limit, {longest:.0f} s: a running task would be delivered again; raise it"
        )
    app.conf.broker_transport_options = {**options, "visibility_timeout": longest + _MARGIN}
