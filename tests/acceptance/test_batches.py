"""The calls of the model that texts share: over HTTP, from a client of its own, on the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import processes
from tests.acceptance.conftest import add, opened, search
from tests.acceptance.project import HOME, Project, Web, suspended
from tests.processes import eventually

expect = pytest.importorskip("playwright.sync_api").expect

# The first test also waits for the model to load.
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

QUERY = "my website is down since the new release"
TOO_LONG = "And then it went on for one more sentence. " * 40
LONE_WAIT = 0.010
TIME = r"(\d+ ms|\d\.\d ms|\d+\.\d\d s)"

#: Embeds the texts that it is given, all at once, and says what became of each.
CLIENT = """
import json, sys, django
django.setup()
from celery import group
from search.tasks import embed

answers = group(embed.s(text) for text in json.loads(sys.argv[1]))()
print("sent", flush=True)
for answer in answers:
    answer.get(timeout=60, propagate=False)
said = [
    str(one.result) if one.failed() else [one.result.call.batch_size, len(one.result.vector)]
    for one in answers
]
print(json.dumps(said))
"""

#: Two searches at once: how often they ask the database, and how many texts they then know.
TWO_READERS = """
import asyncio, json, django
django.setup()
from search.corpus import Corpus
from search.models import DocumentQuerySet

asked = []
searchable = DocumentQuerySet.searchable
DocumentQuerySet.searchable = lambda self: asked.append(self) or searchable(self)

async def main():
    corpus = Corpus()
    await asyncio.gather(corpus.refresh(), corpus.refresh())
    print(json.dumps([len(asked), len(corpus)]))

asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["polled", "awaited"])
def test_an_answer_tells_of_the_models_call(web: Web, way: str) -> None:
    began = time.monotonic()
    if way == "polled":
        call = web.rank(QUERY)["call"]
    else:
        call = web.post("/api/ask/", {"query": QUERY}).body["call"]
    took = time.monotonic() - began

    assert call["batch_size"] == 1
    # Alone, it waited for others as long as was declared, to the resolution of the loop's clock.
    assert call["queue_wait"] > LONE_WAIT * 0.9
    assert call["model_time"] > 0
    assert call["queue_wait"] + call["model_time"] < took


def test_the_texts_that_seed_sends_share_calls(project: Project) -> None:
    done = r"Task search\.tasks\.embed\[(\S+)\] succeeded"
    embedded = re.findall(done, project.model_worker.log_text())
    sizes = [project.web.succeeded(task_id)["call"]["batch_size"] for task_id in embedded]

    assert 1 < max(sizes) <= 32


def test_texts_that_are_added_at_once_share_a_call(project: Project) -> None:
    def share() -> bool:
        with suspended(project.model_worker), ThreadPoolExecutor(6) as threads:
            first_steps = list(threads.map(lambda name: _added(project.web, name), "abcdef"))
        calls = [project.web.succeeded(step)["call"] for step in first_steps]
        return any(call["batch_size"] > 1 for call in calls)

    assert eventually(share, 60)


def test_searches_that_come_at_once_share_a_call(project: Project) -> None:
    def share() -> bool:
        with ThreadPoolExecutor(6) as threads:
            with suspended(project.model_worker):
                sent = [project.web.post("/api/search/", {"query": QUERY}) for _ in range(6)]
            ranked = list(threads.map(lambda one: project.web.succeeded(one.body["task_id"]), sent))
        return any(ranking["call"]["batch_size"] > 1 for ranking in ranked)

    assert eventually(share, 60)


def test_searches_that_come_at_once_read_the_library_one_after_the_other(project: Project) -> None:
    asked, known = _said(_client(project, TWO_READERS))

    # Each asks for the version, and only the first has to read the texts as well.
    assert asked == 3
    assert known >= 25


def test_a_text_that_the_model_refuses_fails_alone(project: Project) -> None:
    def fail_alone() -> bool:
        first, empty, second, long = _embedded(project, ["bread", "  ", "yeast", TOO_LONG])
        assert empty == "The text is empty: there is nothing to compare."
        assert "the model reads 256" in long
        assert first[1] == second[1] == 384
        return first[0] == second[0] == 4

    assert eventually(fail_alone, 60)
    # No call failed for one of its texts, to be repeated in parts.
    assert "is tried again in parts" not in project.model_worker.log_text()


def test_texts_that_the_model_refuses_all_fail_with_their_own_reason(project: Project) -> None:
    empty, long = _embedded(project, ["", TOO_LONG])

    assert "is empty" in empty
    assert "the model reads 256" in long


@pytest.mark.parametrize("way", [".delay()", "await in an async view"])
def test_the_page_shows_the_figures_of_a_search(page: Any, way: str) -> None:
    figures = page.locator("#search-figures")
    expect(figures).to_be_hidden()
    page.get_by_label(way).check()

    search(page, QUERY)

    expect(figures).to_be_visible()
    expect(figure(figures, "batch")).to_have_text("1 text")
    expect(figure(figures, "wait")).to_have_text(re.compile(f"^{TIME}$"))
    expect(figure(figures, "model")).to_have_text(re.compile(f"^{TIME}$"))
    expect(page.locator("#add-figures")).to_be_hidden()


def test_the_page_shows_the_figures_of_a_text_that_was_added(page: Any) -> None:
    figures = page.locator("#add-figures")
    expect(figures).to_be_hidden()

    add(page, "Slate", "Slate splits along planes where clay was pressed for ages.")

    expect(figure(figures, "batch")).to_have_text("1 text")
    expect(figure(figures, "wait")).to_have_text(re.compile(f"^{TIME}$"))
    expect(figure(figures, "model")).to_have_text(re.compile(f"^{TIME}$"))
    expect(page.locator("#search-figures")).to_be_hidden()


def test_the_page_shows_the_figures_that_the_answer_carries(page: Any) -> None:
    """Of a batch that no lone visitor gets."""
    call = {"batch_size": 25, "queue_wait": 0.00421, "model_time": 1.2345}
    page.route("**/api/ask/", lambda route: route.fulfill(json={"results": [], "call": call}))
    page.set_viewport_size({"width": 320, "height": 800})
    page.get_by_label("await in an async view").check()

    search(page, QUERY)

    shown = page.locator("#search-figures dd")
    expect(shown).to_have_text(["25 texts", "4.2 ms", "1.23 s"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_figures_fade_while_the_next_search_runs_and_go_when_it_fails(
    page: Any, project: Project
) -> None:
    figures = page.locator("#search-figures")
    search(page, QUERY)
    expect(figures).to_have_css("opacity", "1")

    with suspended(project.model_worker):
        search(page, TOO_LONG)
        expect(figures).to_have_css("opacity", "0.45")
    expect(page.locator("#search-problem")).to_contain_text("ValueError")
    expect(figures).to_be_hidden()

    search(page, QUERY)
    expect(figures).to_have_css("opacity", "1")
    expect(page.locator("#search-problem")).to_be_empty()


def test_on_celerys_own_pools_it_works_and_says_that_there_are_no_batches(
    browser: Any, unbatched: Project
) -> None:
    call = unbatched.web.rank(QUERY)["call"]
    assert (call["batch_size"], call["queue_wait"]) == (None, None)
    assert call["model_time"] > 0
    assert "is empty" in _embedded(unbatched, [""])[0]

    with opened(browser, unbatched.web.url) as page:
        search(page, QUERY)
        figures = page.locator("#search-figures")
        expect(figure(figures, "batch")).to_have_text("this pool forms none")
        expect(figure(figures, "wait")).to_be_hidden()
        expect(figure(figures, "model")).to_have_text(re.compile(f"^{TIME}$"))


def figure(figures: Any, name: str) -> Any:
    return figures.locator(f"[data-figure={name}]")


def _added(web: Web, name: str) -> str:
    """Add a text; the id of the step that embeds it."""
    text = f"A drawer of the old cabinet carries the letter {name} in faded ink."
    sent = web.post("/api/documents/", {"title": f"Drawer {name}", "text": text})
    assert sent.status == 202, sent
    return str(sent.body["steps"][0])


def _embedded(project: Project, texts: list[str]) -> list[Any]:
    """What a client of its own got for each text: an error's words, or batch size and length.

    All texts wait before the model's worker sees the first, however slowly they are sent.
    """
    with suspended(project.model_worker):
        client = _client(project, CLIENT, json.dumps(texts))
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n", client.communicate()
    return _said(client)


def _client(project: Project, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a script in the project's folder."""
    settings = {"DJANGO_SETTINGS_MODULE": "example.settings"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=HOME,
        env=processes.environment({**project.environment, **settings}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _said(client: subprocess.Popen[str]) -> list[Any]:
    """What a script printed last."""
    with client:
        output, errors = client.communicate(timeout=90)
    assert client.returncode == 0, errors
    said: list[Any] = json.loads(output)
    return said
