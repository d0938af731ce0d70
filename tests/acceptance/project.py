"""The example project with all its parts running, as ``./run demo`` has it."""

from __future__ import annotations

import http.client
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gw_celery import testing
from tests.processes import ROOT, Process, eventually

HOME = ROOT / "example_project"
#: A cold import of torch and the load of the model take ten seconds on a fast disk.
MODEL_TIMEOUT = 180.0


@dataclass(frozen=True)
class Answer:
    """What the API answered."""

    status: int
    body: Any

    @property
    def message(self) -> str:
        """The sentence of an error."""
        return str(self.body["error"]["message"])


@dataclass(frozen=True)
class Web:
    """Django under uvicorn."""

    process: Process
    url: str

    def get(self, path: str) -> Answer:
        return self.send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """Post ``body``, bytes as they are and anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        return self.send(urllib.request.Request(self.url + path, raw, given))

    def send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=90) as response:
                return _answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error.headers, error.read())

    def finished(self, task_id: str, timeout: float = 30.0) -> Any:
        """Ask for a task until it has ended; what the API then says of it."""
        ended = {"SUCCESS", "FAILURE", "REVOKED"}

        def ask() -> Any:
            body = self.get(f"/api/tasks/{task_id}/").body
            return body if body["state"] in ended else None

        return eventually(ask, timeout)

    def rank(self, query: str, **options: Any) -> dict[str, Any]:
        """Search through ``.delay()`` and polling: the results, and the call of the model."""
        sent = self.post("/api/search/", {"query": query, **options})
        assert sent.status == 202, sent
        return self.succeeded(sent.body["task_id"])

    def search(self, query: str, **options: Any) -> list[dict[str, Any]]:
        """Search through ``.delay()`` and polling."""
        hits: list[dict[str, Any]] = self.rank(query, **options)["results"]
        return hits

    def succeeded(self, task_id: str) -> dict[str, Any]:
        """Ask for a task until it has succeeded; what it returned."""
        task = self.finished(task_id)
        assert task["state"] == "SUCCESS", task
        result: dict[str, Any] = task["result"]
        return result


@dataclass(frozen=True)
class Project:
    """Django, a worker that serves the model and a worker for ordinary tasks."""

    web: Web
    model_worker: Process
    plain_worker: Process
    database: Path
    environment: Mapping[str, str]


#: Options of the worker that loads the model, in the GPU pool. Celery knows it by a variable.
GPU_POOL = ("-P", "custom")


@contextmanager
def running(home: Path, pool: Sequence[str] = GPU_POOL) -> Iterator[Project]:
    """Start everything with its data in ``home``, wait until it answers, stop it at the end."""
    with ExitStack() as stack:
        server = stack.enter_context(testing.server(home / "server"))
        database = home / "db.sqlite3"
        environment = {
            "EXAMPLE_DB": str(database),
            "EXAMPLE_BROKER_URL": server.broker_url,
            "EXAMPLE_RESULT_URL": server.result_url,
        }
        start = _Starter(stack, home, environment)
        for command in ("migrate", "seed"):
            assert start(command, "manage.py", command).wait_exit(60) == 0
        worker = ("-m", "celery", "-A", "example", "worker", "-c", "1", "-l", "INFO")
        custom = {"CELERY_CUSTOM_WORKER_POOL": "gw_celery.pool:TaskPool"}
        start_model = _Starter(stack, home, {**environment, **custom})
        found = Project(
            model_worker=start_model("model", *worker, *pool, "-Q", "cpu", "-n", "model@test"),
            plain_worker=start("plain", *worker, "-n", "plain@test"),
            web=start_web(stack, home, environment),
            database=database,
            environment=environment,
        )
        eventually(lambda: _is_ready(found), MODEL_TIMEOUT, interval=0.2)
        yield found


@contextmanager
def suspended(worker: Process) -> Iterator[None]:
    """Hold a worker and its children, so that its messages stay in the broker."""
    held = [psutil.Process(pid) for pid in (worker.pid, *worker.children())]
    for process in held:
        process.suspend()
    try:
        yield
    finally:
        for process in held:
            process.resume()


def start_web(stack: ExitStack, home: Path, environment: Mapping[str, str]) -> Web:
    """Start Django on a free port and wait until it serves."""
    name = f"web-{len(list(home.glob('web-*.log')))}"
    arguments = ("-m", "uvicorn", "example.asgi:application", "--port", "0")
    process = _Starter(stack, home, environment)(name, *arguments)
    process.wait_for_log("Uvicorn running on")
    (url,) = re.findall(r"running on (http://\S+)", process.log_text())
    return Web(process, url)


@dataclass(frozen=True)
class _Starter:
    """Runs Python in the project's folder."""

    stack: ExitStack
    home: Path
    environment: Mapping[str, str]

    def __call__(self, name: str, *arguments: str) -> Process:
        command = (sys.executable, *arguments)
        log = self.home / f"{name}.log"
        process = Process(command, log, env=self.environment, cwd=HOME)
        self.stack.callback(process.stop)
        return process


def _is_ready(project: Project) -> bool:
    """Whether the model answers and all starter texts can be found."""
    for worker in (project.model_worker, project.plain_worker):
        assert worker.exit_code is None, f"{worker} ended:\n{worker.log_tail()}"
    if project.web.post("/api/ask/", {"query": "are you there"}).status != 200:
        return False
    listed = project.web.get("/api/documents/").body["documents"]
    return all(document["searchable"] for document in listed)


def _answer(status: int, headers: http.client.HTTPMessage, raw: bytes) -> Answer:
    is_json = headers.get_content_type() == "application/json"
    return Answer(status, json.loads(raw) if is_json else raw.decode())
