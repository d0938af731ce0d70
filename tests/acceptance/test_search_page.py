"""The example project's page in a headless browser, with the real model behind it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import add, search
from tests.acceptance.project import Project, suspended

expect = pytest.importorskip("playwright.sync_api").expect

# The first test also waits for the model to load.
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

QUERY = "my website is down since the new release"


def test_a_sentence_is_answered_with_the_text_that_means_the_same(page: Any) -> None:
    search(page, QUERY)

    hits = page.locator(".hit")
    expect(hits).to_have_count(5)
    expect(hits.first).to_contain_text("Roll back first")
    score = float(hits.first.locator("[data-field=score]").text_content())
    bars = [bar.bounding_box()["width"] for bar in page.locator(".rule").all()]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] == pytest.approx(score * hits.first.bounding_box()["width"], rel=0.05)
    expect(page.locator("#search-progress .elapsed")).to_have_text(re.compile(r"^\d+\.\d\d s$"))


def test_the_async_view_answers_the_same(page: Any) -> None:
    page.get_by_label("await in an async view").check()
    page.get_by_label("Your sentence").fill(QUERY)
    page.keyboard.press("Enter")

    expect(page.locator(".hit").first).to_contain_text("Roll back first")
    expect(page.locator("#search-progress")).to_have_attribute("data-state", "done")


def test_a_suggestion_is_one_click_away(page: Any) -> None:
    page.get_by_role("button", name="guiding sailors through the dark").click()

    expect(page.locator(".hit").first).to_contain_text("The lighthouse lens")
    expect(page.get_by_label("Your sentence")).to_have_value("guiding sailors through the dark")


def test_progress_is_shown_from_queued_over_running_to_done(page: Any, project: Project) -> None:
    progress = page.locator("#add-progress")
    with ExitStack() as stack:
        with suspended(project.model_worker):
            add(page, "Kettles", "A kettle sings before it boils, because bubbles collapse in it.")
            expect(progress).to_have_attribute("data-state", "queued")
            expect(progress.get_by_role("status")).to_have_text("Queued")
            expect(progress.locator(".elapsed")).to_have_text(re.compile(r"^[1-9]\.\d\d s$"))
            stack.enter_context(write_locked(project.database))
        # The model has answered now, and the task that stores the vector waits for the lock.
        expect(progress).to_have_attribute("data-state", "running")
        expect(progress.get_by_role("status")).to_have_text("Running")
    expect(progress).to_have_attribute("data-state", "done")
    expect(progress.get_by_role("status")).to_have_text("Kettles was added")


def test_a_search_waits_visibly_until_a_worker_is_there(page: Any, project: Project) -> None:
    progress = page.locator("#search-progress")
    with suspended(project.model_worker):
        search(page, QUERY)
        expect(progress).to_have_attribute("data-state", "queued")
        expect(progress.locator(".elapsed")).to_have_text(re.compile(r"^[1-9]\.\d\d s$"))
        expect(page.locator(".hit")).to_have_count(0)
    expect(page.locator(".hit")).to_have_count(5)
    expect(progress.get_by_role("status")).to_have_text("5 results")


def test_an_error_of_the_worker_is_shown(page: Any) -> None:
    before = page.locator("#count").text_content()

    page.get_by_role("button", name="Try one that is too long").click()

    alert = page.locator("#add-problem")
    expect(alert).to_have_text(re.compile(r"ValueError: The text has \d+ word pieces"))
    expect(alert).to_have_role("alert")
    expect(page.locator("#add-progress")).to_have_attribute("data-state", "failed")
    # What was typed is still there to be shortened, and the library is as it was.
    expect(page.get_by_label("Title")).to_have_value("A text that never ends")
    expect(page.locator("#count")).to_have_text(before)


def test_a_search_that_fails_leaves_the_old_results_dimmed(page: Any) -> None:
    search(page, QUERY)
    expect(page.locator(".hit")).to_have_count(5)
    expect(page.locator("#results")).to_have_css("opacity", "1")

    search(page, "and then it went on " * 100)
    expect(page.locator("#search-problem")).to_contain_text("ValueError: The text has")
    expect(page.locator("#results")).to_have_css("opacity", "0.45")

    search(page, QUERY)
    expect(page.locator("#search-problem")).to_be_empty()
    expect(page.locator("#results")).to_have_css("opacity", "1")


@pytest.mark.parametrize("query", ["", "   "])
def test_an_empty_sentence_is_not_sent(page: Any, query: str) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    search(page, query)

    expect(page.get_by_label("Your sentence")).to_be_focused()
    expect(page.locator("#search-progress")).to_have_attribute("data-state", "idle")
    assert "POST" not in sent


def test_what_is_asked_while_a_search_runs_is_answered_next(page: Any, project: Project) -> None:
    with suspended(project.model_worker):
        search(page, QUERY)
        expect(page.locator("#search-progress")).to_have_attribute("data-state", "queued")
        page.get_by_label("Your sentence").fill("getting rid of an annoying spasm")
        page.keyboard.press("Enter")

    expect(page.locator(".hit").first).to_contain_text("A cure for hiccups")
    expect(page.locator("#search-progress")).to_have_attribute("data-state", "done")


def test_a_text_that_is_sent_twice_is_added_once(page: Any, project: Project) -> None:
    before = int(page.locator("#count").text_content())
    with suspended(project.model_worker):
        add(page, "Twice", "An echo needs a wall that stands seventeen metres away, or more.")
        page.get_by_role("button", name="Add", exact=True).click()

    expect(page.locator("#add-progress")).to_have_attribute("data-state", "done")
    expect(page.locator("#count")).to_have_text(str(before + 1))
    expect(page.get_by_label("Title")).to_be_empty()
    expect(page.locator("form#add")).not_to_have_attribute("aria-busy", "true")


def test_an_awaited_search_does_not_claim_to_run(page: Any, project: Project) -> None:
    page.get_by_label("await in an async view").check()
    with suspended(project.model_worker):
        search(page, QUERY)
        expect(page.locator("#search-progress")).to_have_attribute("data-state", "awaiting")
        expect(page.locator("#search-progress [data-step=running]")).to_be_hidden()
    expect(page.locator(".hit")).to_have_count(5)


def test_the_error_goes_away_with_the_next_try(page: Any) -> None:
    page.get_by_role("button", name="Try one that is too long").click()
    expect(page.locator("#add-problem")).to_contain_text("ValueError")

    add(page, "Short enough", "A pencil line can be fifty kilometres long.")

    expect(page.locator("#add-progress")).to_have_attribute("data-state", "done")
    expect(page.locator("#add-problem")).to_be_empty()


def test_an_added_text_can_be_found(page: Any) -> None:
    add(page, "Kimchi", "Cabbage, chilli and salt turn sour in a crock, and keep until spring.")
    expect(page.locator("#shelf li").first).to_contain_text("Kimchi")

    search(page, "preserving vegetables without a fridge")

    expect(page.locator(".hit").first).to_contain_text("Kimchi")


def test_markup_in_a_text_is_text(page: Any) -> None:
    markup = '<img src="/x" onerror="document.title = 1">& <b>tapestry</b> weaving'
    add(page, markup, "Weft threads of dyed wool hide the warp and draw the picture.")
    expect(page.locator("#shelf li").first).to_contain_text(markup)

    search(page, "how a picture is woven on a loom")
    expect(page.locator(".hit").first.get_by_role("heading")).to_have_text(markup)
    page.reload()

    expect(page.locator("#shelf li").first).to_contain_text(markup)
    expect(page).to_have_title("Search by meaning")


def test_all_works_without_a_mouse(page: Any) -> None:
    press(page, "Tab", "Enter")
    expect(page.get_by_label("Your sentence")).to_be_focused()
    page.keyboard.type(QUERY)
    press(page, "Tab", "Tab", "ArrowDown")
    expect(page.get_by_label("await in an async view")).to_be_checked()
    press(page, "Enter")

    expect(page.locator(".hit").first).to_contain_text("Roll back first")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    search(page, QUERY)
    expect(page.locator(".hit")).to_have_count(5)

    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_moves_while_a_search_runs(page: Any) -> None:
    search(page, QUERY)
    expect(page.locator(".hit")).to_have_count(5)
    before = places(page)

    search(page, "getting rid of an annoying spasm")
    expect(page.locator(".hit").first).to_contain_text("A cure for hiccups")

    assert places(page) == before


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def places(page: Any) -> list[float]:
    """Where the parts of the page begin that should stay where they are."""
    parts = ("#search-progress", ".results-head", "#results", "#add", "#shelf")
    return [page.locator(part).bounding_box()["y"] for part in parts]


@contextmanager
def write_locked(database: Path) -> Iterator[None]:
    """Hold SQLite's write lock, so that the next task that writes runs until it is released."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
