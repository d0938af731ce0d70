"""The Django side, each test in an interpreter of its own: Django is set up once in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import environment

#: A project as users write it: settings, and a Celery app that reads them.
SETTINGS = """
SECRET_KEY = "x"
INSTALLED_APPS = ["gw_celery_django"]
CELERY_BROKER_URL = "memory://"
CELERY_RESULT_BACKEND = "redis://localhost/1"
"""
START = """
import json
import celery
import django
from django.core import checks

app = celery.Celery("project")
app.config_from_object("django.conf:settings", namespace="CELERY")

def said():
    return [(one.id, one.msg, one.hint) for one in checks.run_checks(tags=["gw_celery"])]
"""
Project = Callable[..., Any]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A function that sets a project up and returns what the expression at its end gives."""

    def run(answer: str, settings: str = "", body: str = "django.setup()") -> Any:
        (tmp_path / "project_settings.py").write_text(SETTINGS + settings)
        own = environment({"DJANGO_SETTINGS_MODULE": "project_settings"})
        own["PYTHONPATH"] = os.pathsep.join([str(tmp_path), own["PYTHONPATH"]])
        code = f"{START}\n{body}\nprint(json.dumps({answer}))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=own, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_celery_app_of_a_project_is_preset(project) -> None:
    assert project("[app.conf.accept_content, app.conf.result_serializer]") == [
        ["gw-json", "json"],
        "gw-json",
    ]


def test_settings_of_the_project_reach_the_celery_app(project) -> None:
    answer = project(
        "[conf.read(app.conf).start_timeout, conf.read(app.conf).max_instances]",
        'GW_CELERY = {"start_timeout": 900, "max_instances": 2}',
        "django.setup()\nfrom gw_celery import conf",
    )
    assert answer == [900.0, 2]


def test_a_project_that_is_right_passes_the_checks(project) -> None:
    assert project("said()") == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"start_timout": 900}', "GW_CELERY start_timout; did you mean 'start_timeout'?"),
        ('{"start_timeout": "long"}', "GW_CELERY start_timeout='long': must be float over 0"),
        ('{"health_port": "8070"}', "='8070': must be int from 0 to 65535 or None"),
        ('{"probe_period": -1}', "probe_period=-1: must be float over 0 or None"),
        ('["start_timeout"]', "GW_CELERY=['start_timeout']: must be a dict"),
    ],
)
def test_a_setting_that_is_wrong_is_an_error_of_the_checks(project, given, expected) -> None:
    ((code, message, _),) = project("said()", f"GW_CELERY = {given}")

    assert code == "gw_celery.E001"
    assert expected in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{'replicas': 3, 'start_timout': 60}", "did you mean 'gw_start_timeout'"),
        ("{'start_timeout': 'abc'}", "gw_start_timeout='abc'"),
    ],
)
def test_a_process_that_runs_no_checks_refuses_a_wrong_setting_too(
    project, given, expected
) -> None:
    """Such as a worker: it would start without the whole of GW_CELERY."""
    body = """
django.setup()
import gw_celery as gw
try:
    gw.preset(app)
except gw.errors.ConfigurationError as exc:
    refusal = str(exc)
"""
    assert expected in project("refusal", f"GW_CELERY = {given}", body)


def test_a_setting_of_the_celery_app_that_is_wrong_is_an_error_of_the_checks(project) -> None:
    # Django keeps checks in a set: several find the mistake, in any order.
    said = {code: message for code, message, _ in project("said()", "CELERY_GW_START_TIMOUT = 900")}

    assert "did you mean 'CELERY_GW_START_TIMEOUT'?" in said["gw_celery.E001"]


def test_a_setting_in_two_places_is_an_error_when_they_differ(project) -> None:
    body = "app.conf.gw_start_timeout = 3\ndjango.setup()"
    ((code, message, _),) = project("said()", 'GW_CELERY = {"start_timeout": 900}', body)

    assert code == "gw_celery.E001"
    assert "GW_CELERY['start_timeout']=900" in message
    assert "app.conf.gw_start_timeout=3" in message


def test_the_same_setting_in_two_places_is_fine(project) -> None:
    body = "app.conf.gw_start_timeout = 900\ndjango.setup()"

    assert project("said()", 'GW_CELERY = {"start_timeout": 900}', body) == []


def test_content_that_is_not_accepted_is_an_error(project) -> None:
    ((code, message, _),) = project("said()", 'CELERY_ACCEPT_CONTENT = ["json"]')

    assert code == "gw_celery.E003"
    assert "accept_content=['json'] lacks 'gw-json'" in message


DECLARED = """
import gw_celery as gw
served = gw.App("project")

@served.remote(timeout=7200)
async def slow(): ...

django.setup()
"""


@pytest.mark.parametrize(
    "setting", ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERY_BROKER_READ_URL"]
)
def test_tls_that_verifies_no_server_is_an_error_unless_it_is_allowed(project, setting) -> None:
    settings = f'{setting} = "rediss://far?ssl_cert_reqs=none"'
    found = [(code, message) for code, message, _ in project("said()", settings)]
    assert [code for code, _ in found if code == "gw_celery.E004"]
    assert "far" in dict(found)["gw_celery.E004"]

    allowed = project("said()", f'{settings}\nGW_CELERY = {{"insecure": True}}')
    assert "gw_celery.E004" not in [code for code, _, _ in allowed]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("None", "no result backend"),
        ('"cache+memory://"', "cannot notify"),
        ('"rpc://"', None),
    ],
)
def test_a_result_backend_that_makes_views_wait_is_a_warning(project, backend, expected) -> None:
    said = project("said()", f"CELERY_RESULT_BACKEND = {backend}")

    assert [code for code, _, _ in said] == (["gw_celery.W001"] if expected else [])
    assert all(expected in message and hint for _, message, hint in said)


def test_a_project_that_imports_no_celery_app_is_told(project) -> None:
    body = "celery._state._tls.current_app = None\ncelery._state.default_app = None\ndjango.setup()"
    said = project("said()", body=body)

    ((message, hint),) = [(one, hint) for code, one, hint in said if code == "gw_celery.E002"]
    assert "Celery's current app is not the project's" in message
    assert "from .celery import app as celery_app" in hint


def test_tasks_of_a_project_can_wait_for_the_commit(project) -> None:
    assert project("hasattr(slow, 'delay_on_commit')", body=DECLARED) is True
    bound = DECLARED.replace('gw.App("project")', 'gw.App("project", celery=app)')
    assert project("hasattr(slow, 'delay_on_commit')", body=bound) is True
