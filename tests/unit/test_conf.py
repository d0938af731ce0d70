"""The settings as a project writes them: ``preset`` reads all of them, and says what is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery

import gw_celery as gw
from gw_celery import conf, errors
from tests.processes import ROOT
from tests.unit.refusals import NOT_FINITE


def documented() -> dict[str, str]:
    """The type of each setting, as docs/configuration.md says it."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `gw_(\w+)` \| (.+?), `([^`]+)` \|", text, re.MULTILINE)
    return {name: kind.replace("\\", "") for name, kind, _ in rows}


SETTINGS = documented()
NUMBERS = [name for name, kind in SETTINGS.items() if kind in ("int", "float")]


def celery_app(**own: object) -> Celery:
    app = Celery("conf", broker="memory://", set_as_current=False)
    app.conf.update({f"gw_{name}": value for name, value in own.items()})
    return app


def accepted(**own: object) -> dict[str, object]:
    """The same settings as they are read back."""
    app = celery_app(**own)
    gw.preset(app)
    settings = conf.read(app.conf)
    return {name: getattr(settings, name) for name in own}


def refused(**own: object) -> str:
    with pytest.raises(errors.ConfigurationError) as caught:
        gw.preset(celery_app(**own))
    return str(caught.value)


def test_what_is_like_no_setting_is_an_error_with_all_of_them_as_they_are_written() -> None:
    known = refused(xyz=1).removeprefix("unknown setting app.conf.gw_xyz; known: ")
    assert sorted(known.split(", ")) == sorted(f"gw_{name}" for name in SETTINGS)


def test_an_unknown_key_is_an_error_with_the_nearest_one() -> None:
    assert refused(start_timout=9) == (
        "unknown setting app.conf.gw_start_timout; did you mean 'gw_start_timeout'?"
    )


def test_settings_are_read_through_the_namespace_of_a_project() -> None:
    class Project:
        CELERY_GW_START_TIMEOUT = 900
        GW_CELERY = {"not": "read here"}
        GW_OTHER = 1

    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")
    gw.preset(app)
    Project.CELERY_GW_START_TIMEOUT = -1
    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")
    with pytest.raises(errors.ConfigurationError, match="setting CELERY_GW_START_TIMEOUT=-1: must"):
        gw.preset(app)


def test_an_unknown_key_in_the_namespace_of_a_project_is_an_error() -> None:
    class Project:
        CELERY_GW_START_TIMEOUTS = 900

    app = celery_app()
    app.config_from_object(Project, namespace="CELERY")

    with pytest.raises(errors.ConfigurationError, match="did you mean 'CELERY_GW_START_TIMEOUT'"):
        gw.preset(app)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "5", None, [], 0, -1, *NOT_FINITE])
def test_a_number_that_is_none_is_an_error(name: str, value: object) -> None:
    said = refused(**{name: value})

    assert f"gw_{name}={value!r}: must be {SETTINGS[name]}" in said
    assert "over 0" in said or "5 at least" in said


@pytest.mark.parametrize("name", [name for name, kind in SETTINGS.items() if "float" in kind])
def test_an_int_is_taken_for_seconds(name: str) -> None:
    value = 1 if name == "target_util" else 900
    assert accepted(**{name: value}) == {name: value}
    assert type(accepted(**{name: value})[name]) is float


@pytest.mark.parametrize("name", [name for name, kind in SETTINGS.items() if "None" in kind])
def test_what_may_be_left_out_may_be_none(name: str) -> None:
    assert accepted(**{name: None}) == {name: None}
    assert refused(**{name: []}).endswith(" or None")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"target_util": 1.5}, "target_util=1.5: must be float over 0, 1 at most"),
        ({"worker_ttl": 4.9}, "worker_ttl=4.9: must be float, 5 at least"),
        ({"worker_ttl": None}, "worker_ttl=None: must be float, 5 at least"),
        ({"health_port": 65_536}, "health_port=65536: must be int from 0 to 65535 or None"),
        ({"health_port": 10**400}, f"health_port={10**400}: must be int from 0 to 65535 or None"),
        ({"health_port": True}, "health_port=True: must be int from 0 to 65535 or None"),
        ({"health_port": -1}, "health_port=-1: must be int from 0 to 65535 or None"),
        ({"max_instances": 3.0}, "max_instances=3.0: must be int over 0"),
        ({"health_host": 7}, "health_host=7: must be str"),
        ({"dead_letter_queue": 7}, "dead_letter_queue=7: must be str or None"),
        ({"insecure": "no"}, "insecure='no': must be bool"),
        ({"show_values": 1}, "show_values=1: must be bool"),
    ],
)
def test_what_is_out_of_its_bounds_is_an_error_that_names_them(
    own: dict[str, object], said: str
) -> None:
    assert refused(**own) == f"setting app.conf.gw_{said}"


@pytest.mark.parametrize(
    "own",
    [
        {"target_util": 1.0},
        {"worker_ttl": 5},
        {"health_port": 0},
        {"health_port": 65_535},
        {"gpu_kinds": ("B200", "B300")},
        {"dead_letter_queue": "dead"},
        {"insecure": True},
    ],
)
def test_what_is_within_its_bounds_is_accepted(own: dict[str, Any]) -> None:
    assert accepted(**own) == own


def test_kinds_may_be_a_list() -> None:
    assert accepted(gpu_kinds=["B200"]) == {"gpu_kinds": ("B200",)}


@pytest.mark.parametrize("value", ["B200", 3, [1], None, {"B200": 1}])
def test_kinds_that_are_no_list_of_names_are_an_error(value: object) -> None:
    assert "gpu_kinds" in refused(gpu_kinds=value)
