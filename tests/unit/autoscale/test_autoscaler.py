"""The autoscaler of one worker: when it grows its pool, shrinks it, or holds its size."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
from celery.worker import autoscale as celerys
from kombu.asynchronous import Hub
from kombu.utils.imports import symbol_by_name

from tests.unit.autoscale.handmade import Scaled


def test_it_is_found_where_the_setting_names_it_and_another_pool_has_celerys_own() -> None:
    pool: Any = types.SimpleNamespace(num_processes=1)
    autoscaler = symbol_by_name("gw_celery.autoscale:Autoscaler")
    found = autoscaler(pool, 3, 1, worker=None, mutex=None)
    assert type(found) is celerys.Autoscaler
    assert (found.max_concurrency, found.keepalive) == (3, celerys.AUTOSCALE_KEEPALIVE)


def test_it_grows_at_once_by_what_waits_and_has_children_started_at_once(scaled: Scaled) -> None:
    scaled.queued = 290
    assert scaled.after(1) == 3
    assert (scaled.pool.limit, scaled.pool.maintained) == (15, 1)


def test_the_pool_hears_what_waits(scaled: Scaled) -> None:
    scaled.queued = 7
    scaled.after(1)
    assert scaled.pool.noted == [{"model": 7}]


def test_it_grows_no_further_than_its_bound(scaled: Scaled) -> None:
    scaled.queued = 100_000
    assert scaled.after(1) == 4


def test_it_shrinks_when_nothing_has_come_for_long_and_no_further_than_its_bound(
    scaled: Scaled,
) -> None:
    scaled.queued = 290
    scaled.after(1)
    scaled.queued = 0
    assert scaled.after(30) == 3
    assert scaled.after(1500) == 1


def test_a_message_decides_nothing(scaled: Scaled) -> None:
    scaled.queued = 1000
    scaled.now += 1.0
    scaled.scaler.maybe_scale(object())
    assert scaled.pool.desired == 1


def test_what_was_read_is_judged_once_however_many_timers_there_are(
    scaled: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = scaled.latest()
    monkeypatch.setattr(scaled.pool.cluster, "latest", lambda: reading)
    for _ in range(3):
        scaled.scaler.maybe_scale()
    assert len(scaled.pool.noted) == 1


def test_a_worker_that_stops_is_left_alone(scaled: Scaled) -> None:
    scaled.scaler.end()
    scaled.queued = 1000
    assert scaled.after(3) == 1


def test_a_worker_that_stops_has_no_part_of_the_replicas_while_its_last_input_runs(
    scaled: Scaled,
) -> None:
    scaled.after(1)
    scaled.scaler.end()
    scaled.pool.cluster.observe(scaled.pool.snapshot())  # the driver does so until it has ended
    assert scaled.record.size is None


def test_a_broker_that_cannot_be_read_holds_the_size(scaled: Scaled) -> None:
    scaled.queued = 290
    scaled.after(1)
    scaled.queued = None
    assert scaled.after(3000) == 3
    assert "kept" in scaled.pool.scaling.why


def test_what_the_worker_holds_counts_with_what_waits(scaled: Scaled) -> None:
    scaled.holds(arrived=290.0, waiting=290.0, waiting_inputs=290)
    assert scaled.after(1) == 3


def test_without_a_score_slots_are_counted(scaled: Scaled) -> None:
    scaled.pool.known_scores = {}
    scaled.queued = 10
    assert scaled.after(1) == 3


def test_to_zero_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for timeout, expected in ((None, 1), (60.0, 0)):
        scaled = Scaled(monkeypatch, gw_inactivity_timeout=timeout)
        scaled.scaler.update(min=0)
        assert scaled.after(50) == 1
        assert scaled.after(3000) == expected
        assert (scaled.pool.cluster.period < 1.0) is (expected == 0)
        scaled.queued = 1
        assert scaled.after(1) == 1
        scaled.app.close()


@pytest.mark.parametrize(
    ("settings", "replicas"),
    [
        ({}, 2),
        ({"gw_target_util": 0.3}, 4),
        ({"gw_target_queue_time": 2.0}, 4),
        ({"gw_min_load": 30.0}, 4),
    ],
    ids=str,
)
def test_what_is_set_is_what_is_decided_by(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], replicas: int
) -> None:
    # 13 arrive a second, 50 wait, and a replica does 10 a second.
    scaled = Scaled(monkeypatch, **settings)
    scaled.queued = 50
    for second in range(120):
        scaled.holds(arrived=13.0 * second)
        scaled.after(1)
    assert scaled.pool.desired == replicas
    scaled.app.close()


def test_what_goes_for_want_of_inputs_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = Scaled(monkeypatch, gw_inactivity_timeout=5.0)
    scaled.scaler.update(min=0)
    scaled.queued = 290
    scaled.after(3)
    scaled.queued = 0
    with caplog.at_level(logging.INFO):
        assert scaled.after(8) == 0
    said = [one.message for one in caplog.records if "replicas: " in one.message]
    assert said == [
        "the pool goes from 3 to 1 replicas: no input came, waited or ran for 5 s",
        "the pool goes from 1 to 0 replicas: no input came, waited or ran for 5 s",
    ]
    scaled.app.close()


def test_where_queues_cannot_be_read_no_operator_gets_to_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled = Scaled(monkeypatch, gw_inactivity_timeout=2.0)
    scaled.tells = False
    scaled.scaler.update(min=0)
    assert scaled.after(60) == 1
    scaled.scaler.force_scale_down(5)
    assert scaled.after(60) == 1
    scaled.app.close()


def test_before_the_last_replica_goes_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = Scaled(monkeypatch, gw_inactivity_timeout=2000.0)
    scaled.scaler.update(min=0)
    scaled.queued = 290
    scaled.after(1)
    scaled.queued = 0
    sizes = [scaled.after(1) for _ in range(3000)]
    assert set(sizes) >= {3, 1, 0}
    assert sizes == sorted(sizes, reverse=True)
    assert sizes.count(1) > 1
    scaled.app.close()


def test_a_replica_that_loads_for_longer_than_that_does_not_go_before_it_was_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled = Scaled(monkeypatch, gw_inactivity_timeout=5.0)
    scaled.scaler.update(min=0)
    scaled.shows("entering", pid=7)
    assert scaled.after(60) == 1
    scaled.shows_its_own()
    assert scaled.after(4) == 1
    assert scaled.after(4) == 0
    scaled.app.close()


# -- what it says and goes by --


def test_large_figures_are_told_in_full(scaled: Scaled, caplog: pytest.LogCaptureFixture) -> None:
    scaled.queued = 68_612
    with caplog.at_level(logging.INFO):
        scaled.after(3)
    assert any("68612 wait" in one.message for one in caplog.records)


def test_what_is_next_to_nothing_is_told_so(scaled: Scaled) -> None:
    scaled.after(1)
    scaled.holds(arrived=0.000_4)
    scaled.after(1)
    assert "model needs <0.001 (<0.001/s come, 0 wait," in scaled.seen["why"]


def test_it_says_what_it_saw_and_decided(scaled: Scaled, caplog: pytest.LogCaptureFixture) -> None:
    scaled.queued = 290
    with caplog.at_level(logging.INFO):
        scaled.after(3)
    said = [one.message for one in caplog.records if "replicas: " in one.message]
    assert said == [
        "the pool goes from 1 to 3 replicas: "
        "model needs 2.9 (0/s come, 290 wait, a replica does 10/s)"
    ]
    info = scaled.scaler.info()
    assert (info["max"], info["min"], info["current"]) == (20, 5, 15)
    assert info["gw"]["desired"] == info["gw"]["actual"] == 3
    assert info["gw"]["services"]["model"]["queued"] == 290


def test_the_last_decision_is_shown(scaled: Scaled) -> None:
    assert (scaled.seen["least"], scaled.seen["most"], scaled.seen["why"]) == (1, 4, "")
    scaled.queued = 290
    scaled.after(1)
    assert (scaled.seen["desired"], scaled.seen["least"]) == (3, 1)


def test_a_start_takes_as_long_as_it_has_taken(scaled: Scaled) -> None:
    scaled.shows("ready", pid=7, start_up=100.0)
    scaled.after(1)
    assert scaled.seen["start_up"] == pytest.approx(100.0)


def test_replicas_are_kept_for_bursts_for_as_long_as_the_setting_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled = Scaled(monkeypatch, gw_scale_window=300.0)
    scaled.after(1)
    scaled.holds(arrived=290.0)
    assert scaled.after(300) == 3
    assert scaled.after(50) == 1
    scaled.app.close()


# -- without an event loop --


def test_celerys_thread_decides_where_there_is_no_loop(scaled: Scaled) -> None:
    scaled.queued = 290
    scaled.on_read()  # so that it does not wait
    scaled.now += 1.0
    scaled.scaler.body()
    assert scaled.pool.desired == 3


def test_without_a_reading_the_size_is_kept_and_its_reason_told(scaled: Scaled) -> None:
    scaled.queued = 290
    assert scaled.after(1) == 3
    scaled.queued = None
    assert scaled.after(1) == 3
    assert "nothing is known of the broker" in scaled.pool.scaling.why


def test_what_was_read_is_judged_in_the_thread_of_the_loop_at_once(
    scaled: Scaled, hub: Hub
) -> None:
    scaled.after(1)
    scaled.queued = 290
    scaled.on_read()
    assert scaled.pool.desired == 1
    assert scaled.pool.woken == 1, "the loop may be asleep for a second"
    next(hub.loop)
    assert scaled.pool.desired > 1
    scaled.scaler.end()
    scaled.on_read()
    assert scaled.pool.woken == 1


def test_a_decision_that_fails_keeps_the_size_and_the_worker(
    scaled: Scaled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = scaled.after(1)
    with monkeypatch.context() as patch:
        patch.setattr(scaled.pool, "snapshot", lambda: 1 / 0)
        assert scaled.after(2) == before
    assert caplog.text.count("the autoscaler failed and keeps the pool's size") == 2
    scaled.queued = 290
    assert scaled.after(3) > before
