"""The Celery configuration that our tasks need, in every process, and checks for conflicts."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gw_celery import codec, conf, errors
from gw_celery.declare import registry
from gw_celery.transport import find

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


def require_verified_tls(app: Any) -> None:
    """Check that each TLS connection to the broker and the result backend verifies its server.

    Raises:
        ConfigurationError: if one does not, and the setting ``insecure`` does not allow it.
    """
    if conf.read(app.conf).insecure:
        return
    for setting, url, why in _unverified(app):
        raise errors.ConfigurationError(
            f"{setting}: {url} {why}, so that others on the network could read and change "
            f"messages: set ssl_cert_reqs=required with ssl_ca_certs, or allow it with "
            f"gw_insecure=True"
        )


def _unverified(app: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the setting, the URL and the fault of connections that do not verify their server."""
    for connection in (app.connection_for_write(), app.connection_for_read()):
        for url in connection.alt or [None]:
            if url is not None:
                connection.switch(url)
            if why := _fault(connection.ssl, find.redis_transport(connection) is not None):
                yield "broker", connection.as_uri(), why
    if why := _fault(getattr(app.backend, "connparams", None), is_redis=True):
        yield "result_backend", app.backend.as_uri(), why


def _fault(options: Any, is_redis: bool) -> str:
    """Return what is wrong with the TLS options of a connection; ``""`` if nothing is."""
    if not isinstance(options, Mapping):  # kombu's Redis transport ignores broker_use_ssl=True
        return "would not be encrypted (broker_use_ssl=True)" if options and is_redis else ""
    name = "ssl_cert_reqs" if is_redis else "cert_reqs"
    # redis-py takes None for "none".
    nothing = (ssl.CERT_NONE, "none", "CERT_NONE", *([None] if is_redis else []))
    if options.get(name, ssl.CERT_REQUIRED) in nothing:
        return f"does not verify the server's certificate ({name}=none)"
    if not options.get("ssl_check_hostname", True):
        return "accepts the certificate of any host (ssl_check_hostname=false)"
    return ""
