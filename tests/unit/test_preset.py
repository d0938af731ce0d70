from __future__ import annotations

import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import codec, conf, errors
from gw_celery.client import preset


def bare(**own: object) -> Celery:
    app = Celery("bare", broker="memory://", set_as_current=False)
    app.conf.update(own)
    return app


def limited(celery_app: Celery, timeout: float | None) -> gw.App:
    app = gw.App("limited", celery=celery_app)

    @app.remote(timeout=timeout)
    async def body(): ...

    celery_app.finalize()
    return app


def test_it_fills_in_what_the_user_left_at_celerys_default() -> None:
    app = bare()
    gw.preset(app)

    assert app.conf.accept_content == ["gw-json", "json"]
    assert app.conf.result_serializer == "gw-json"
    assert app.conf.broker_connection_retry_on_startup is True
    assert app.conf.broker_transport_options == {
        "visibility_timeout": 3600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
    }


def test_it_keeps_what_the_user_set() -> None:
    own = {
        "accept_content": ["json", "gw-json", "yaml"],
        "result_serializer": "json",
        "broker_connection_retry_on_startup": False,
    }
    app = bare(**own, broker_transport_options={"unacked_restore_interval": 9, "x": 1})
    gw.preset(app)

    assert {name: app.conf[name] for name in own} == own
    assert app.conf.broker_transport_options["unacked_restore_interval"] == 9
    assert app.conf.broker_transport_options["x"] == 1


def test_it_changes_nothing_that_only_workers_need() -> None:
    before, app = bare(), bare()
    gw.preset(app)

    for name in (
        "worker_prefetch_multiplier",
        "worker_proc_alive_timeout",
        "task_acks_late",
        "task_serializer",
        "worker_cancel_long_running_tasks_on_connection_loss",
    ):
        assert app.conf[name] == before.conf[name]


def test_it_refuses_unknown_settings() -> None:
    with pytest.raises(errors.ConfigurationError, match="did you mean 'gw_start_timeout'"):
        gw.preset(bare(gw_start_timout=3))


def test_it_can_be_called_twice() -> None:
    app = bare()
    gw.preset(app)
    before = dict(app.conf.broker_transport_options), list(app.conf.accept_content)
    gw.preset(app)

    assert before == (app.conf.broker_transport_options, app.conf.accept_content)


def test_the_limits_of_the_settings_reach_the_codec() -> None:
    preset.configure_codec(conf.Settings(max_payload_depth=3))
    try:
        with pytest.raises(errors.SerializationError, match="3 levels"):
            codec.dumps([[[[1]]]])
    finally:
        preset.configure_codec(conf.Settings())
    assert codec.loads(codec.dumps([[[[1]]]])) == [[[[1]]]]


def test_after_the_preset_our_content_is_accepted() -> None:
    app = bare()
    gw.preset(app)

    preset.require_content(app)
    assert codec.NAME in app.conf.accept_content
    assert app.conf.result_serializer == codec.NAME


@pytest.mark.parametrize("name", ["accept_content", "result_accept_content"])
def test_content_that_is_not_accepted_is_an_error_with_the_remedy(name: str) -> None:
    app = bare(**{name: ["json"]})
    gw.preset(app)

    with pytest.raises(errors.ConfigurationError) as caught:
        preset.require_content(app)
    assert f"{name}=['json'] lacks 'gw-json'" in str(caught.value)
    assert "call gw_celery.preset(app), or add it" in str(caught.value)


def test_a_serializer_that_changes_answers_is_an_error() -> None:
    app = bare(result_serializer="json")
    gw.preset(app)

    with pytest.raises(errors.ConfigurationError, match="result_serializer='json'"):
        preset.require_content(app)


def test_a_default_visibility_is_raised_over_the_longest_limit(celery_app) -> None:
    app = limited(celery_app, 7200)
    preset.require_visibility(celery_app, [app.registry])

    assert celery_app.conf.broker_transport_options["visibility_timeout"] > 7200


@pytest.mark.parametrize("timeout", [300, None])
def test_a_visibility_that_is_long_enough_is_left(celery_app, timeout) -> None:
    app = limited(celery_app, timeout)
    preset.require_visibility(celery_app, [app.registry])

    assert celery_app.conf.broker_transport_options["visibility_timeout"] == 3600


@pytest.mark.parametrize("value", ["100", None, True])
def test_a_visibility_that_is_no_number_is_an_error(celery_app, value) -> None:
    celery_app.conf.broker_transport_options = {"visibility_timeout": value}
    app = limited(celery_app, 300)

    with pytest.raises(errors.ConfigurationError, match=r"must be seconds, a number") as caught:
        preset.require_visibility(celery_app, [app.registry])
    assert f"['visibility_timeout']={value!r}" in str(caught.value)


def test_a_visibility_of_the_users_under_a_limit_is_an_error(celery_app) -> None:
    celery_app.conf.broker_transport_options = {"visibility_timeout": 200}
    app = limited(celery_app, 300)

    with pytest.raises(errors.ConfigurationError) as caught:
        preset.require_visibility(celery_app, [app.registry])
    assert "['visibility_timeout']=200" in str(caught.value)
    assert "300 s" in str(caught.value)
