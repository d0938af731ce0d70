from __future__ import annotations

from gw_celery.policy import backoff


def test_delays_double_to_the_longest_and_begin_anew_after_a_success() -> None:
    delays = backoff.Backoff(0.1, 5.0)
    assert [delays.next() for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    delays.reset()
    assert delays.next() == 0.1
