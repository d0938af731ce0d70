"""The options of one call: what is nearly a known one is a mistake, and would be sent in silence.

Anything else may be meant for the broker: Celery hands what it does not know to its publisher.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from gw_celery import errors

#: Ours, Celery's and kombu's, and AMQP's properties; a test compares them with the libraries.
KNOWN = (
    "timeout",
    "add_to_parent", "app_id", "argsrepr", "chain", "chord", "cluster_id", "compression",
    "confirm_timeout", "connection", "content_encoding", "content_type", "correlation_id",
    "countdown", "create_sent_event", "declare", "delivery_mode", "eta", "exchange",
    "exchange_type", "expiration", "expires", "group_id", "group_index", "headers", "ignore_result",
    "immediate", "kwargsrepr", "link", "link_error", "mandatory", "message_id", "origin",
    "parent_id", "priority", "producer", "publisher", "queue", "replaced_task_nesting", "reply_to",
    "result_cls", "retries", "retry", "retry_policy", "root_id", "route_name", "router",
    "routing_key", "serializer", "shadow", "soft_time_limit", "stamped_headers", "task_id",
    "task_type", "time_limit", "timestamp", "type", "user_id",
)  # fmt: skip


def refuse_misspelt(given: Mapping[str, Any]) -> None:
    """Refuse what is no option of a call, and nearly is one.

    Raises:
        UsageError: with the nearest known option.
    """
    stamps = given.get("stamped_headers") or ()
    for name, value in given.items():
        if name in KNOWN or name in stamps:
            continue
        if near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8):
            raise errors.UsageError(
                f"options({name}={value!r}): unknown option; did you mean {near[0]}=?"
            )
