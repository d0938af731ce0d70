"""The example project's JSON API, over HTTP, with the real model in a real worker."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import psutil
import pytest

from tests.acceptance.project import Project, Web, start_web
from tests.processes import eventually

# The first test also waits for the model to load.
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

SAME_MEANING = [
    ("my website is down since the new release", "Roll back first"),
    ("guiding sailors through the dark", "The lighthouse lens"),
    ("how an epidemic was ended", "The first vaccine"),
    ("insects that survive the cold months", "The shivering cluster"),
    ("getting rid of an annoying spasm", "A cure for hiccups"),
]
TOO_LONG = "And then it went on for one more sentence. " * 40


@pytest.mark.parametrize(("query", "title"), SAME_MEANING)
def test_a_query_finds_the_text_that_means_the_same(web: Web, query: str, title: str) -> None:
    hits = web.search(query)

    assert hits[0]["title"] == title
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1 for score in scores)


def test_an_awaited_search_answers_as_the_polled_one_does(web: Web) -> None:
    query = SAME_MEANING[0][0]

    answer = web.post("/api/ask/", {"query": query})

    assert answer.status == 200
    assert answer.body["query"] == query
    assert answer.body["results"] == web.search(query)


def test_top_k_says_how_many_results_come(web: Web) -> None:
    assert len(web.search("the sea", top_k=2)) == 2
    assert len(web.post("/api/ask/", {"query": "the sea", "top_k": 7}).body["results"]) == 7
    assert len(web.search("the sea")) == 5


def test_an_added_document_can_be_found(web: Web) -> None:
    title = "Tattoos"
    text = "Ink put into the dermis is swallowed by cells that cannot digest it, and so it stays."

    sent = web.post("/api/documents/", {"title": title, "text": text})

    assert sent.status == 202
    assert web.finished(sent.body["task_id"])["state"] == "SUCCESS"
    states = [web.get(f"/api/tasks/{step}/").body["state"] for step in sent.body["steps"]]
    assert states == ["SUCCESS"] * 2
    best = web.search("a drawing on my skin that never fades")[0]
    assert (best["title"], best["text"]) == (title, text)
    assert best["document_id"] == sent.body["document_id"]
    listed = web.get("/api/documents/").body["documents"][0]
    assert listed["title"] == title
    assert listed["searchable"]


def test_a_text_that_the_model_cannot_read_whole_fails_and_is_not_kept(web: Web) -> None:
    title = "Endless"

    sent = web.post("/api/documents/", {"title": title, "text": TOO_LONG})
    task = web.finished(sent.body["task_id"])

    assert task["state"] == "FAILURE"
    assert task["error"]["type"] == "ValueError"
    assert "the model reads 256" in task["error"]["message"]
    eventually(lambda: title not in _titles(web))


def test_a_polled_query_that_is_too_long_fails_with_the_models_reason(web: Web) -> None:
    sent = web.post("/api/search/", {"query": TOO_LONG})

    error = web.finished(sent.body["task_id"])["error"]

    assert error["type"] == "ValueError"
    assert "the model reads 256" in error["message"]


def test_an_awaited_query_that_is_too_long_is_refused_with_the_models_reason(web: Web) -> None:
    answer = web.post("/api/ask/", {"query": TOO_LONG})

    assert answer.status == 400
    assert answer.body["error"]["type"] == "ValueError"
    assert "the model reads 256" in answer.message


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/api/search/", {}, '"query" must be a text'),
        ("/api/search/", {"query": "   "}, '"query" must be a text'),
        ("/api/ask/", {"query": "\ud800"}, '"query" has half of a character'),
        ("/api/documents/", {"title": "x", "text": "\udfff"}, '"text" has half'),
        ("/api/search/", {"query": 7}, '"query" must be a text'),
        ("/api/search/", {"query": "x", "top_k": True}, '"top_k" must be a whole number'),
        ("/api/ask/", {"query": "x", "top_k": 21}, "from 1 to 20"),
        ("/api/ask/", ["x"], "must be a JSON object"),
        ("/api/ask/", b"{", "is not JSON"),
        ("/api/ask/", b"\xff", "is not JSON"),
        ("/api/documents/", {"title": "x"}, '"text" must be a text'),
        ("/api/documents/", {"title": "x" * 121, "text": "x"}, "at most 120"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    web: Web, path: str, body: object, sentence: str
) -> None:
    answer = web.post(path, body)

    assert answer.status == 400
    assert sentence in answer.message


def test_a_body_that_is_too_large_is_refused(web: Web) -> None:
    assert web.post("/api/ask/", {"query": "x" * 200_000}).status == 413


def test_only_json_is_accepted(web: Web) -> None:
    answer = web.post("/api/ask/", b"query=x", {"Content-Type": "text/plain"})

    assert answer.status == 400
    assert "application/json" in answer.message


def test_a_browser_on_another_site_cannot_post(web: Web) -> None:
    answer = web.post("/api/ask/", {"query": "x"}, {"Origin": "https://evil.example"})

    assert answer.status == 403


def test_an_unknown_task_is_pending(web: Web) -> None:
    answer = web.get(f"/api/tasks/{uuid4()}/")

    assert answer.body == {"state": "PENDING", "result": None, "error": None}


def test_the_page_may_load_from_its_own_origin_only(web: Web) -> None:
    with urllib.request.urlopen(web.url + "/", timeout=10) as response:
        policy = response.headers["Content-Security-Policy"]

    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_health_is_asked_at_healthz(web: Web) -> None:
    assert web.get("/healthz").body["ok"] is True


def test_torch_is_loaded_where_the_model_runs_and_nowhere_else(project: Project) -> None:
    (model,) = project.model_worker.children()

    assert _has_torch(model)
    assert not _has_torch(project.model_worker.pid)
    plain = [project.plain_worker.pid, *project.plain_worker.children()]
    assert not any(_has_torch(pid) for pid in [project.web.process.pid, *plain])


@pytest.fixture(scope="module")
def cut_off(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """Django on the same library, with a broker that was never started."""
    home = tmp_path_factory.mktemp("cut-off")
    nowhere = f"redis+socket://{home}/no.sock?virtual_host="
    urls = {"EXAMPLE_BROKER_URL": f"{nowhere}0", "EXAMPLE_RESULT_URL": f"{nowhere}1"}
    with ExitStack() as stack:
        yield start_web(stack, home, {**project.environment, **urls})


@pytest.mark.parametrize("path", ["/api/search/", "/api/ask/", "/api/documents/"])
def test_a_broker_that_is_down_is_said_within_seconds(cut_off: Web, path: str) -> None:
    began = time.monotonic()
    answer = cut_off.post(path, {"query": "x", "title": "Lost", "text": "x"})
    took = time.monotonic() - began

    assert answer.status == 503
    assert "broker does not answer" in answer.message
    assert took < 5
    assert "Lost" not in _titles(cut_off)


def test_a_task_cannot_be_asked_for_while_the_result_store_is_down(cut_off: Web) -> None:
    assert cut_off.get(f"/api/tasks/{uuid4()}/").status == 503


def _titles(web: Web) -> list[str]:
    return [document["title"] for document in web.get("/api/documents/").body["documents"]]


def _has_torch(pid: int) -> bool:
    return any("libtorch" in mapped.path for mapped in psutil.Process(pid).memory_maps())
