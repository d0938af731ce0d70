from __future__ import annotations

import ssl
from collections.abc import Iterator

import pytest
from celery import Celery
from kombu import serialization
from kombu.exceptions import EncodeError

import gw_celery as gw
from gw_celery import errors
from tests.unit.worker.starting import isolate, refusal, start

#: Celery's own pools that serve our tasks: on Redis, their messages are kombu's to redeliver.
STOCK = ("prefork", "solo")


@pytest.fixture(autouse=True)
def _a_start_ends_with_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch)


def bare(**own: object) -> Celery:
    app = Celery("bare", set_as_current=False)
    app.conf.update({"broker_url": "memory://", **own})
    return app


def limited(celery_app: Celery, timeout: float | None) -> Celery:
    """The app, with a service on the queue ``cpu.body`` whose inputs have this time limit."""

    @gw.App("limited", celery=celery_app).remote(gpu=gw.Gpu("CPU"), timeout=timeout)
    async def body(): ...

    celery_app.finalize()
    return celery_app


def test_it_fills_in_what_the_user_left_at_celerys_default() -> None:
    app = bare()
    gw.preset(app)

    assert app.conf.accept_content == ["gw-json", "json"]
    assert app.conf.result_serializer == "gw-json"
    assert app.conf.broker_connection_retry_on_startup is True


def test_it_keeps_what_the_user_set() -> None:
    own = {
        "accept_content": ["json", "gw-json", "yaml"],
        "result_serializer": "json",
        "broker_connection_retry_on_startup": False,
    }
    app = bare(**own)
    gw.preset(app)

    assert {name: app.conf[name] for name in own} == own


def test_it_changes_nothing_that_only_workers_need() -> None:
    before, app = bare(), bare()
    gw.preset(app)

    for name in (
        "worker_prefetch_multiplier",
        "worker_proc_alive_timeout",
        "task_acks_late",
        "task_serializer",
        "worker_cancel_long_running_tasks_on_connection_loss",
        "broker_transport_options",
    ):
        assert app.conf[name] == before.conf[name]


def test_it_refuses_unknown_settings() -> None:
    with pytest.raises(errors.ConfigurationError, match="did you mean 'gw_start_timeout'"):
        gw.preset(bare(gw_start_timout=3))


def test_it_can_be_called_twice() -> None:
    app = bare()
    gw.preset(app)
    before = list(app.conf.accept_content)
    gw.preset(app)

    assert before == app.conf.accept_content


@pytest.fixture
def _defaults_afterwards() -> Iterator[None]:
    yield
    gw.preset(bare())


@pytest.mark.usefixtures("_defaults_afterwards")
def test_the_limits_of_the_settings_reach_the_codec() -> None:
    gw.preset(bare(gw_max_payload_depth=3))
    with pytest.raises(EncodeError, match="3 levels"):
        serialization.dumps([[[[1]]]], serializer="gw-json")
    gw.preset(bare())
    kind, encoding, written = serialization.dumps([[[[1]]]], serializer="gw-json")
    assert serialization.loads(written, kind, encoding, accept=[kind]) == [[[[1]]]]


def test_what_the_user_set_is_kept_in_any_namespace() -> None:
    class Project:
        CELERY_ACCEPT_CONTENT = ["json"]

    app = Celery("named", broker="memory://", set_as_current=False)
    app.config_from_object(Project, namespace="CELERY")
    app.conf.broker_connection_retry_on_startup = False
    gw.preset(app)

    assert app.conf.accept_content == ["json"]
    assert app.conf.broker_connection_retry_on_startup is False
    assert app.conf.result_serializer == "gw-json"


def test_after_the_preset_our_content_is_accepted() -> None:
    app = limited(bare(), 300)
    gw.preset(app)

    start(app, "cpu.body")
    assert "gw-json" in app.conf.accept_content
    assert app.conf.result_serializer == "gw-json"


@pytest.mark.parametrize("name", ["accept_content", "result_accept_content"])
def test_content_that_is_not_accepted_is_an_error_with_the_remedy(name: str) -> None:
    app = limited(bare(**{name: ["json"]}), 300)
    gw.preset(app)

    said = refusal(app, "cpu.body")
    assert f"{name}=['json'] lacks 'gw-json'" in said
    assert "call gw_celery.preset(app), or add it" in said


def test_a_serializer_that_changes_answers_is_an_error() -> None:
    app = limited(bare(result_serializer="json"), 300)
    gw.preset(app)

    assert "result_serializer='json'" in refusal(app, "cpu.body")


@pytest.mark.parametrize("pool", STOCK)
def test_a_default_visibility_is_raised_over_the_longest_limit(
    celery_app: Celery, pool: str
) -> None:
    start(limited(celery_app, 7200), "cpu.body", pool=pool)
    assert celery_app.conf.broker_transport_options["visibility_timeout"] > 7200


@pytest.mark.parametrize("timeout", [300, None])
def test_a_visibility_that_is_long_enough_is_left(
    celery_app: Celery, timeout: float | None
) -> None:
    start(limited(celery_app, timeout), "cpu.body", pool="prefork")
    assert "visibility_timeout" not in celery_app.conf.broker_transport_options


@pytest.mark.parametrize("value", ["100", None, True])
def test_a_visibility_that_is_no_number_is_an_error(celery_app: Celery, value: object) -> None:
    celery_app.conf.broker_transport_options = {"visibility_timeout": value}

    said = refusal(limited(celery_app, 300), "cpu.body", pool="prefork")
    assert f"['visibility_timeout']={value!r}: must be seconds, a number" in said


@pytest.mark.parametrize("pool", STOCK)
def test_a_visibility_of_the_users_under_a_limit_is_an_error(celery_app: Celery, pool: str) -> None:
    celery_app.conf.broker_transport_options = {"visibility_timeout": 200}

    said = refusal(limited(celery_app, 300), "cpu.body", pool=pool)
    assert "['visibility_timeout']=200" in said
    assert "300 s" in said


@pytest.mark.parametrize("options", [{}, {"visibility_timeout": 200}])
def test_on_the_gpu_pool_no_limit_depends_on_the_visibility(
    celery_app: Celery, options: dict[str, object]
) -> None:
    celery_app.conf.broker_transport_options = options

    start(limited(celery_app, 7200), "cpu.body")
    assert celery_app.conf.broker_transport_options == options


OPEN = {"ssl_cert_reqs": ssl.CERT_NONE}
VERIFIED = "rediss://:secret@far?ssl_cert_reqs=required"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"broker_url": "rediss://:secret@far?ssl_cert_reqs=none"}, "ssl_cert_reqs=none"),
        ({"broker_url": "rediss://:secret@far"}, "ssl_cert_reqs=none"),
        (
            {"broker_url": "redis://far", "broker_use_ssl": {"ssl_cert_reqs": None}},
            "ssl_cert_reqs=none",
        ),
        ({"broker_url": f"{VERIFIED}&ssl_check_hostname=false"}, "ssl_check_hostname=false"),
        ({"broker_url": "redis://far", "broker_use_ssl": OPEN}, "ssl_cert_reqs=none"),
        ({"broker_url": "rediss://far", "broker_use_ssl": True}, "would not be encrypted"),
        ({"broker_url": f"{VERIFIED};rediss://far?ssl_cert_reqs=none"}, "ssl_cert_reqs=none"),
        ({"broker_url": VERIFIED, "broker_read_url": "rediss://far"}, "ssl_cert_reqs=none"),
        (
            {"broker_url": "amqps://far", "broker_use_ssl": {"cert_reqs": ssl.CERT_NONE}},
            "(cert_reqs=none)",
        ),
        ({"result_backend": "rediss://:secret@far?ssl_cert_reqs=none"}, "result_backend: rediss"),
        ({"result_backend": "redis://far", "redis_backend_use_ssl": OPEN}, "result_backend: redis"),
    ],
)
def test_tls_that_verifies_no_server_is_an_error_unless_it_is_allowed(
    own: dict[str, object], said: str
) -> None:
    reason = refusal(limited(bare(**own), 300), "celery")
    assert said in reason
    assert "gw_insecure=True" in reason
    assert "secret" not in reason

    start(limited(bare(**own, gw_insecure=True), 300), "celery")


@pytest.mark.parametrize(
    "own",
    [
        {"broker_url": VERIFIED, "result_backend": VERIFIED},
        {"broker_url": "redis://far", "result_backend": "redis://far"},
        {"broker_url": "redis://far", "broker_use_ssl": {"ssl_ca_certs": "ca.pem"}},
        {"broker_url": "amqps://far", "broker_use_ssl": True},
        {"broker_url": "amqp://far", "result_backend": "rpc://"},
        {},
    ],
)
def test_tls_that_verifies_its_server_and_no_tls_are_accepted(own: dict[str, object]) -> None:
    start(limited(bare(**own), 300), "celery")
