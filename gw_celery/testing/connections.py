"""Which servers the Celery apps of a test's process talk to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from celery import _state

from gw_celery import conf, devserver
from gw_celery.calling import waiting

#: Of the server that the apps were last told of.
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
            waiting.close_all()
            for app in list(_state._get_active_apps()):
                _forget(app)
        yield


def _forget(app: Any) -> None:
    app._after_fork()  # Celery's own way to leave behind connections that are not to be used
    app._local = threading.local()  # where each thread has its result backend
