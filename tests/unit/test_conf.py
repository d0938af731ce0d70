from __future__ import annotations

import dataclasses

import pytest
from celery import Celery

from gw_celery import conf, errors
from tests.unit.refusals import NOT_FINITE

NUMBERS = [one.name for one in dataclasses.fields(conf.Settings) if one.type in ("int", "float")]


def celery_app(**own: object) -> Celery:
    app = Celery("conf", broker="memory://", set_as_current=False)
    app.conf.update(own)
    return app


def refused(given: dict[str, object]) -> str:
    with pytest.raises(errors.ConfigurationError) as caught:
        conf.from_mapping(given)
    return str(caught.value)


def test_without_settings_there_are_the_defaults() -> None:
    assert conf.read(celery_app().conf) == conf.Settings()


def test_every_default_is_a_setting_that_is_accepted() -> None:
    defaults = dataclasses.asdict(conf.Settings())

    assert conf.from_mapping(defaults) == conf.Settings()


def test_settings_are_read_from_the_celery_app() -> None:
    settings = conf.read(celery_app(gw_start_timeout=900, gw_max_instances=2).conf)

    assert settings == conf.Settings(start_timeout=900.0, max_instances=2)


def test_settings_are_read_through_the_namespace_of_a_project() -> None:
    class Project:
        CELERY_GW_START_TIMEOUT = 900
        GW_CELERY = {"not": "read here"}
        GW_OTHER = 1

    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")

    assert conf.read(app.conf).start_timeout == 900.0


def test_an_unknown_key_in_the_namespace_of_a_project_is_an_error() -> None:
    class Project:
        CELERY_GW_START_TIMEOUTS = 900

    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")

    with pytest.raises(errors.ConfigurationError, match="did you mean 'CELERY_GW_START_TIMEOUT'"):
        conf.read(app.conf)


def test_an_int_is_taken_for_seconds() -> None:
    assert type(conf.from_mapping({"start_timeout": 900}).start_timeout) is float


def test_a_list_is_taken_for_a_tuple_of_names() -> None:
    assert conf.from_mapping({"gpu_kinds": ["B200"]}).gpu_kinds == ("B200",)


def test_an_unknown_key_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        conf.read(celery_app(gw_start_timout=9).conf)

    assert str(caught.value) == (
        "unknown setting app.conf.gw_start_timout; did you mean 'gw_start_timeout'?"
    )
    assert refused({"start_timout": 9}) == (
        "unknown setting GW_CELERY start_timout; did you mean 'start_timeout'?"
    )


def test_what_is_like_no_setting_is_an_error_with_all_of_them_as_they_are_written() -> None:
    with pytest.raises(errors.ConfigurationError, match="known: gw_gpu_kinds, gw_start_timeout,"):
        conf.read(celery_app(gw_xyz=1).conf)


def test_an_unknown_key_like_no_other_is_an_error_with_all_of_them() -> None:
    said = refused({"xyz": 1})

    assert said.startswith("unknown setting GW_CELERY xyz")
    assert all(one.name in said for one in dataclasses.fields(conf.Settings))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "5", None, [], 0, -1, *NOT_FINITE])
def test_a_number_that_is_none_is_an_error(name: str, value: object) -> None:
    said = refused({name: value})

    assert f"GW_CELERY {name}={value!r}" in said
    assert "over 0" in said


def test_more_than_all_of_a_score_cannot_be_used() -> None:
    assert conf.from_mapping({"target_util": 1}).target_util == 1.0
    assert "target_util=1.5: must be float over 0, 1 at most" in refused({"target_util": 1.5})


def test_a_float_is_no_count() -> None:
    assert "max_instances=3.0: must be int" in refused({"max_instances": 3.0})


@pytest.mark.parametrize("value", ["B200", 3, [1], None, {"B200": 1}])
def test_kinds_that_are_no_list_of_names_are_an_error(value: object) -> None:
    assert "gpu_kinds" in refused({"gpu_kinds": value})


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        conf.Settings().start_timeout = 1.0  # type: ignore[misc]


def test_the_server_program_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("GW_CELERY_SERVER", raising=False)
    assert conf.server_program() is None

    monkeypatch.setenv("GW_CELERY_SERVER", "/opt/valkey-server")
    assert conf.server_program() == "/opt/valkey-server"


def test_what_the_user_set_is_told_from_a_default_in_any_namespace() -> None:
    class Project:
        CELERY_ACCEPT_CONTENT = ["json"]

    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")
    app.conf.task_acks_late = False
    conf.read(app.conf)

    assert conf.is_set(app.conf, "accept_content")
    assert conf.is_set(app.conf, "task_acks_late")
    assert not conf.is_set(app.conf, "result_serializer")


@pytest.mark.parametrize("ttl", [5, 15.0, None])
def test_a_worker_is_lost_after_five_seconds_at_the_earliest(ttl: float | None) -> None:
    assert conf.from_mapping({"worker_ttl": ttl}).worker_ttl == ttl
    assert "must be float, 5 at least or None" in refused({"worker_ttl": 4.9})
