"""The connections of the Celery apps in the process of a test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from celery import _state

from gw_celery import conf, devserver
from gw_celery.client import calls

#: Broker URL of the server that the apps used last.
_last_url = ""


@contextlib.contextmanager
def talking_to(server: devserver.Server) -> Iterator[None]:
    """Let every Celery app of this process use ``server`` until the block ends.

    An app keeps its connections, and makes some in eager mode, too: those to other servers are
    forgotten.
    """
    global _last_url
    with conf.talking_to(server.broker_url, server.result_url):
        if server.broker_url != _last_url:
            _last_url = server.broker_url
            close_all()
        yield


def close_all() -> None:
    """Close the connections of the Celery apps of this process, which connect again on use."""
    calls.close_all()
    for app in list(_state._get_active_apps()):
        with contextlib.suppress(Exception):  # the server may be gone
            close_results(app)
        app._after_fork()  # Celery's own way to leave behind connections that are not to be used
        app._local = threading.local()  # where each thread has its result backend


def close_results(app: Any) -> None:
    """Close the connections of this thread's result backend, over RPC or to Redis."""
    backend = getattr(app._local, "backend", None)
    consumer = getattr(backend, "result_consumer", None)
    if (connection := getattr(consumer, "_connection", None)) is not None:
        connection.close()
    elif consumer is not None:
        consumer.stop()
        # A result that is collected later unsubscribes, over another connection if need be.
        consumer._pubsub = None
    if (client := vars(backend).get("client") if backend else None) is not None:
        client.connection_pool.disconnect()
