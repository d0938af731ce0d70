"""``served`` with a configuration that cannot work, chosen by ``WRONG``."""

from __future__ import annotations

import os

from served import celery

celery.conf.update(
    {
        "content": {"accept_content": ["json"]},
        "results": {"result_serializer": "json"},
        "visibility": {"broker_transport_options": {"visibility_timeout": 60}},
        "unknown": {"gw_start_timeot": 5.0},
        "type": {"gw_start_timeout": "soon"},
    }[os.environ["WRONG"]]
)
