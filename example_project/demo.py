"""Run the whole example: server, workers, beat, Django and Flower. ``./run demo`` calls it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from parts import HERE, Ending, Part, PartFailed, claimed_port, stop_all, wait_until

from gw_celery import devserver, errors

DATA = HERE.parent / ".run"
START_TIMEOUT = 180.0
ANSWER_TIMEOUT = 60.0
#: A worker that still loads its model would finish that first; no caller waits for it.
STOP_TIMEOUT = 8.0
NODES = ("model@demo", "tasks@demo")
#: What a developer's shell may say of another project: the demo is this one and its own server's.
#: And never an open API of Flower by accident: it asks for a password, or serves none.
FOREIGN = (
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
    "DJANGO_SETTINGS_MODULE",
    "FLOWER_UNAUTHENTICATED_API",
)
QUESTION = "How does bread get its bubbles?"


class Demo:
    """The running example, asked over HTTP as a browser would ask it."""

    def __init__(
        self, server: devserver.Server, data: Path, ending: Ending, *, web: int, flower: int
    ) -> None:
        self.server = server
        self.ending = ending
        self.data = data
        self.logs = data / "logs"
        self.web_port = web
        self.flower_port = flower
        self.env = {
            **os.environ,
            "EXAMPLE_BROKER_URL": server.broker_url,
            "EXAMPLE_RESULT_URL": server.result_url,
            "EXAMPLE_DB": str(data / "db.sqlite3"),
            "PYTHONUNBUFFERED": "1",
        }
        self.parts = list(self._parts())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.web_port}/"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.flower_port}/"

    def _parts(self) -> Iterator[Part]:
        celery = ["-m", "celery", "-A", "example"]
        beat = ["beat", "-l", "INFO", "-s", str(self.data / "beat")]
        options = ["-l", "INFO", "-E"]
        worker = [*celery, "worker", *options]
        web = ["-m", "uvicorn", "example.asgi:application", "--host", "127.0.0.1"]
        # "cpu" is the family of the services that say Gpu("CPU"): this worker loads the model, in
        # one replica of the GPU pool. Other workers of the project keep Celery's own pool.
        on_gpu_pool = [*celery, "gw", "worker", *options, "--gpu", "CPU", "-n", NODES[0]]
        yield Part("model", self.logs, on_gpu_pool)
        yield Part("tasks", self.logs, [*worker, "-c", "1", "-Q", "celery", "-n", NODES[1]])
        yield Part("beat", self.logs, [*celery, *beat])
        yield Part("web", self.logs, [*web, "--port", str(self.web_port), "--lifespan", "off"])
        flower = ["flower", "--address=127.0.0.1", f"--port={self.flower_port}"]
        yield Part("flower", self.logs, [*celery, *flower])

    def start(self) -> None:
        """Start every part, and return when each has shown that it works."""
        self._manage("migrate")
        for part in self.parts:
            part.start(self.env)
        self._manage("seed")
        self._wait_for_workers()
        model, _, beat, web, flower = self.parts
        self._wait(beat, lambda: "beat: Starting" in beat.log.read_text())
        self._wait(flower, lambda: answers(self.flower_url))
        self._wait(web, lambda: answers(self.url + "healthz"))
        # An answer proves the whole way: Django, broker, a worker with its model loaded, results.
        self._wait(model, lambda: self._try_ask() is not None)
        self._wait(model, self._is_library_searchable)

    def check(self) -> None:
        """Raise PartFailed when something died, KeyboardInterrupt when the end was asked for."""
        self.ending.check()
        if not self.server.is_running:
            raise PartFailed(f"the server ended; see {self.server.log}")
        for part in self.parts:
            part.check()

    def _manage(self, command: str) -> None:
        part = Part(command, self.logs, ["manage.py", command])
        part.start(self.env)
        part.finish()

    def _wait(self, suspect: Part, ask: Callable[[], object]) -> None:
        wait_until(ask, self.check, suspect, START_TIMEOUT)

    def _wait_for_workers(self) -> None:
        with Celery("demo", broker=self.server.broker_url, set_as_current=False) as app:
            for part, node in zip(self.parts, NODES, strict=False):
                self._wait(part, app.control.inspect([node], timeout=0.5).ping)

    def _try_ask(self) -> Any:
        with contextlib.suppress(urllib.error.URLError, TimeoutError):
            return post(self.url + "api/ask/", {"query": QUESTION})
        return None

    def _is_library_searchable(self) -> bool:
        listed = get(self.url + "api/documents/")["documents"]
        return bool(listed) and all(document["searchable"] for document in listed)

    def search(self, query: str) -> dict[str, Any]:
        """Search as the page does: send a task, then ask how far it is."""
        task = (
            self.url + f"api/tasks/{post(self.url + 'api/search/', {'query': query})['task_id']}/"
        )
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while (answer := get(task))["state"] not in {"SUCCESS", "FAILURE"}:
            if time.monotonic() > deadline:
                raise PartFailed(f"no answer within {ANSWER_TIMEOUT:.0f} s: {answer}")
            time.sleep(0.1)
        if answer["state"] == "FAILURE":
            raise PartFailed(f"the search failed: {answer['error']}")
        return dict(answer["result"])

    def watch(self) -> None:
        """Return never: ``check`` ends it."""
        while True:
            self.check()
            time.sleep(0.5)

    def stop(self) -> None:
        stop_all(self.parts, STOP_TIMEOUT)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT + 10) as answer:
        return json.load(answer)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask_once(demo: Demo) -> None:
    """Ask one question over HTTP and print the answer."""
    found = demo.search(QUESTION)
    if not found["results"]:
        raise PartFailed("the search found nothing in a library that is not empty")
    best, call = found["results"][0], found["call"]
    print(f"question: {QUESTION}\nanswer:   {best['title']} ({best['score']:.2f})")
    print(f"          {best['text']}")
    print(
        f"call:     batch of {call['batch_size']}, waited {call['queue_wait'] * 1000:.1f} ms, "
        f"{call['model_time'] * 1000:.1f} ms in the model"
    )


@contextlib.contextmanager
def own_server(data: Path) -> Iterator[devserver.Server]:
    try:
        server = devserver.start(data / "server")
    except errors.ServerFailed as error:
        # What is an argument of the library is an option here.
        raise PartFailed(str(error).replace("another data_dir", "another --data")) from error
    try:
        yield server
    finally:
        server.stop()


def run(data: Path, ending: Ending, is_check: bool) -> None:
    (data / "logs").mkdir(parents=True, exist_ok=True)
    print("Starting the server, two workers, beat, Django and Flower ...", flush=True)
    with own_server(data) as server, claimed_port(8000) as web, claimed_port(5555) as flower:
        demo = Demo(server, data, ending, web=web, flower=flower)
        try:
            demo.start()
            print(f"  page    {demo.url}\n  Flower  {demo.flower_url}\n  logs    {demo.logs}")
            print("ready" if is_check else "ready: Ctrl-C stops everything", flush=True)
            if is_check:
                ask_once(demo)
            else:
                demo.watch()
        finally:
            demo.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--check", action="store_true", help="ask one question, then stop")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder that keeps everything",
    )
    given = parser.parse_args(argv)
    ending = Ending()
    ending.install()
    for name in FOREIGN:
        os.environ.pop(name, None)
    # While a worker starts, a ping without an answer is no news.
    logging.getLogger("celery").setLevel(logging.ERROR)
    try:
        run(given.data.resolve(), ending, given.check)
    except KeyboardInterrupt:
        print("stopped")
    except (PartFailed, errors.GWCeleryError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
