"""Count our files that one request passes: ``.venv/bin/python -m tests.trace_request``.

A file counts when a function of it is called, in the client, the worker or its child, between
``.delay()`` and the stored result, or in the moment after it in which the worker is told of it:
that overlaps with the client's look for the result, so that only the second figure is the same each
time. Requests are sent one by one after a warm-up: what few of them met, such as what runs once a
second, is left out. Workers and children have a profiler from their start, by way of a
``sitecustomize``.
"""

from __future__ import annotations

import collections
import gc
import json
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What only the client needs is imported where it is used: the recorder runs in every process.
PACKAGE = f"{Path(__file__).resolve().parent.parent / 'gw_celery'}{os.sep}"
ROUNDS = 20
#: In how many of them a file has to be met: what the clock does once a second is met in fewer.
LEAST = 10
#: Seconds in which the worker has followed its child's report, whose result is stored before it.
MOMENT = 0.03
#: Names the folder in which the processes record, and find what is to be recorded.
FOLDER = "GW_TRACE_FOLDER"
#: Values of the shared byte: nothing, a phase of a round (1 and 2, 3 and 4, ...), and the end.
IDLE, OVER = 0, 255
#: The state byte's file in the folder.
STATE = "state"


class Recorder:
    """Records the files of ours that are called while the shared state is neither idle nor over."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder = folder
        self._role = role
        with open(folder / STATE, "r+b") as shared:
            self._state = mmap.mmap(shared.fileno(), 1)
        self._seen: set[tuple[int, str]] = set()
        self._is_written = False

    def start(self) -> None:
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)

    def profile(self, frame: Any, event: str, argument: Any) -> None:
        state = self._state[0]
        if state == IDLE or event != "call":
            return
        if state == OVER:
            self.write()
        elif (name := frame.f_code.co_filename).startswith(PACKAGE):
            self._seen.add((state, name.removeprefix(PACKAGE)))

    def write(self) -> None:
        """Leave what was recorded in the folder."""
        if not self._is_written:
            self._is_written = True
            path = self._folder / f"{self._role}-{os.getpid()}.json"
            path.with_suffix(".part").write_text(json.dumps(sorted(self._seen)))
            path.with_suffix(".part").rename(path)


def start_in_process() -> None:
    """Record in this process, if it is a worker or a child of one; called by ``sitecustomize``."""
    if os.environ.get(FOLDER):
        is_child = any(word.startswith("gw_celery.") for word in sys.orig_argv)  # `-m gw_celery...`
        role = "child" if is_child else "worker"
        Recorder(Path(os.environ[FOLDER]), role).start()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="gw-trace-") as name:
        folder = Path(name)
        (folder / STATE).write_bytes(bytes([IDLE]))
        found = _trace(folder)
    _show("until the result is stored", found, phases=(1,))
    _show("until the worker has heard of it", found, phases=(1, 0))
    return 0


def _trace(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Send requests to a worker whose processes record; returns what each of them met."""
    (folder / "sitecustomize.py").write_text(
        "from tests import trace_request\ntrace_request.start_in_process()\n"
    )
    import redis

    from gw_celery import testing
    from tests.processes import IMPORT_PATHS, environment, eventually

    sys.path[:0] = map(str, IMPORT_PATHS)
    import golden_app

    recorder = Recorder(folder, "client")
    paths = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
    env = {"PYTHONPATH": paths, FOLDER: str(folder), "SETTINGS": json.dumps({"gw_replicas": 1})}
    with (
        testing.server(folder / "server") as server,
        testing.worker("golden_app:celery", "-Q", "cpu", server=server, env=env) as worker,
        redis.Redis(unix_socket_path=str(server.socket), db=1) as results,
        open(folder / STATE, "r+b") as shared,
        mmap.mmap(shared.fileno(), 1) as state,
    ):
        for _ in range(3):
            golden_app.tasks.weighed.delay("warm").get(timeout=20)
        recorder.start()
        for number in range(ROUNDS):
            time.sleep(random.uniform(0.15, 0.65))  # not in step with what runs once a second
            state[0] = 2 * number + 1
            sent = golden_app.tasks.weighed.delay("four")
            _wait(lambda key=f"celery-task-meta-{sent.id}": results.exists(key))
            state[0] = 2 * number + 2
            time.sleep(MOMENT)
            state[0] = IDLE
        sys.setprofile(None)
        state[0] = OVER
        recorder.write()
        eventually(lambda: len(list(folder.glob("*-*.json"))) >= 3, 20)
        assert worker.exit_code is None
        del sent
        gc.collect()  # a result unsubscribes when it is collected: it needs the server once more
    found = collections.defaultdict(list)
    for path in folder.glob("*-*.json"):
        found[path.name.partition("-")[0]] += json.loads(path.read_text())
    return found


def _wait(is_over: Callable[[], Any]) -> None:
    """Poll without a call of ours."""
    end = time.monotonic() + 20
    while not is_over():
        assert time.monotonic() < end


def _show(what: str, found: dict[str, list[tuple[int, str]]], phases: tuple[int, ...]) -> None:
    by_role = {
        role: _met_often([(state, file) for state, file in seen if state % 2 in phases])
        for role, seen in found.items()
    }
    files = set().union(*by_role.values())
    print(f"{len(files)} files {what}")
    for role in ("client", "worker", "child"):
        print(f"  {role}: {len(by_role.get(role, ()))}")
        for file in sorted(by_role.get(role, ())):
            print(f"    {file}")


def _met_often(seen: list[tuple[int, str]]) -> set[str]:
    """The files that enough rounds met."""
    rounds = collections.defaultdict(set)
    for state, file in seen:
        rounds[file].add((state - 1) // 2)
    return {file for file, met in rounds.items() if len(met) >= LEAST}


if __name__ == "__main__":
    sys.exit(main())
