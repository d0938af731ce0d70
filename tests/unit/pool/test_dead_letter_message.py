from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

from gw_celery.pool import dead_letter_message

DEATH = dead_letter_message.Death(
    reason="it killed", since="2026-01-02T03:04:05+00:00", worker="w@h", deaths=3
)


def message(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "body": b"[[1], {}, null]",
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "headers": {"id": "a", "task": "proj.embed", "mine": "kept"},
            "properties": {"priority": 3, "reply_to": "r", "correlation_id": "a"},
            "delivery_info": {"exchange": "", "routing_key": "gpu.embed", "redelivered": True},
            **given,
        }
    )


def test_a_dead_letter_is_the_message_with_why_when_who_and_how_often() -> None:
    sent = message()
    letter = dead_letter_message.bury(sent, DEATH)
    assert (letter.body, letter.content_type, letter.content_encoding) == (
        sent.body,
        "application/json",
        "utf-8",
    )
    assert letter.properties == sent.properties
    assert sent.headers.items() <= letter.headers.items()
    assert letter.summary() == {
        "id": "a",
        "task": "proj.embed",
        "queue": "gpu.embed",
        "deaths": 3,
        "since": "2026-01-02T03:04:05+00:00",
        "worker": "w@h",
        "reason": "it killed",
    }


def test_what_is_sent_again_is_what_was_sent_first_with_no_deaths() -> None:
    sent = message()
    sent.headers |= {"x-delivery-count": 4, "gw-enqueued": 1.0, "x-death": [{"count": 1}]}
    alive = dead_letter_message.revive(dead_letter_message.bury(sent, DEATH))
    assert alive.headers == {"id": "a", "task": "proj.embed", "mine": "kept", "gw-requeued": True}
    assert (alive.body, alive.properties) == (sent.body, sent.properties)


def test_a_compressed_body_is_compressed_again_for_its_headers_say_so() -> None:
    sent = message(headers={"id": "a", "compression": "application/x-gzip"})
    assert zlib.decompress(dead_letter_message.read(sent).body) == sent.body


def test_what_the_broker_would_act_on_stays_behind() -> None:
    sent = message(properties={"expiration": "1000", "user_id": "guest", "delivery_tag": 1})
    assert dead_letter_message.read(sent).properties == {}


def test_a_long_reason_is_cut_for_headers_have_a_limit() -> None:
    death = dead_letter_message.Death(reason="x" * 10**6, since="", worker="", deaths=1)
    assert (
        len(dead_letter_message.bury(message(), death).headers[dead_letter_message.REASON]) == 1000
    )
