"""An app whose bodies fork, or use up what their process has; ``LEDGER`` names what they write.

``FORKS_AT_LOAD`` makes a context fork: ``async`` or ``sync``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ledger
from celery import Celery

import gw_celery as gw

celery = Celery("forking", set_as_current=False)
gw.preset(celery)
celery.conf.worker_pool = "gw_celery.pool:TaskPool"
celery.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))
app = gw.App("forking", celery)
CPU = gw.Gpu("CPU")


def fork(how: str) -> str:
    """Fork; the fork leaves its body as ``how`` says, or stays."""
    if os.fork():
        return "parent"
    ledger.write("fork", how)
    if how == "stay":
        time.sleep(600)
    if how == "write":  # into the socket of its parent's parent
        with contextlib.suppress(OSError):
            os.write(int(sys.argv[1]), b"\xff" * 64)
    time.sleep(0.3)
    if how == "raise":
        raise ValueError("in the fork")
    if how == "exit":
        raise SystemExit(3)
    return "fork"


def fork_in_thread(how: str) -> str:
    """Fork in a thread that ends before the fork does."""
    thread = threading.Thread(target=fork, args=(how,))
    thread.start()
    thread.join()
    return "parent"


@app.context()
class Model:
    async def __aenter__(self) -> Model:
        if os.environ.get("FORKS_AT_LOAD") == "async":
            fork("return")
        return self

    async def __aexit__(self, *exc: object) -> None: ...


@app.context()
class Helper:
    """Starts a process that must outlive the thread of the hook."""

    def __enter__(self) -> int:
        self.pid = 0
        if os.environ.get("FORKS_AT_LOAD") == "sync":
            self.pid = os.fork()
            if not self.pid:
                ledger.write("fork", "helper")
                time.sleep(600)
        return self.pid

    def __exit__(self, *exc: object) -> None: ...


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=20)
async def beside(name: str, steps: int) -> str:
    """Write each step, in as many turns of the loop."""
    for step in range(steps):
        ledger.write("step", f"{name}-{step}")
        await asyncio.sleep(0)
    return name


@app.remote(gpu=CPU)
@gw.concurrent(max_inputs=4)
async def forks(how: str) -> str:
    answer = fork(how)
    if how == "await" and answer == "fork":
        await asyncio.sleep(0)
        ledger.write("awaited")
        await asyncio.sleep(600)
    return answer


@app.remote(gpu=CPU)
async def forks_in_task(how: str) -> str:
    async def apart() -> str:
        return fork(how)

    (answer,) = await asyncio.gather(apart())
    return answer


@app.remote(gpu=CPU)
@gw.batched(max_batch_size=4, wait_ms=1)
async def forks_in_batch(hows: list[str]) -> list[str]:
    return [fork(how) for how in hows]


@app.cls(gpu=CPU)
class Desk:
    @gw.method()
    @gw.batched(max_batch_size=4, wait_ms=1)
    def forks_in_batch(self, hows: list[str]) -> list[str]:
        return [fork(how) for how in hows]

    @gw.method()
    def forks(self, how: str) -> str:
        return fork(how)

    @gw.method()
    def forks_in_thread(self, how: str) -> str:
        return fork_in_thread(how)

    @gw.method()
    def eats(self, what: str) -> str:
        EATERS[what]()
        return what

    @gw.method()
    def opens(self) -> int:
        """Need a file; returns this process."""
        with open(os.devnull):
            return os.getpid()


@celery.task
def plain_forks(how: str) -> str:
    return fork(how)


@app.remote(gpu=CPU)
async def helper() -> int:
    """The process that the context has started."""
    return int(app.get_context(Helper))


_kept: list[Any] = []


def _open_all(make: Callable[[], Any]) -> None:
    while True:
        try:
            _kept.append(make())
        except OSError:
            return


EATERS: dict[str, Callable[[], None]] = {
    "files": lambda: _open_all(lambda: open(os.devnull)),  # noqa: SIM115
    "pipes": lambda: _open_all(os.pipe),
    "limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)),
}


@app.remote(gpu=CPU)
async def eats(what: str) -> str:
    EATERS[what]()
    return what


@app.remote(gpu=CPU)
async def eats_for_a_moment() -> int:
    """Free them each time before the child counts as unfit."""
    most = 0
    for _ in range(6):
        EATERS["files"]()
        await asyncio.sleep(0.3)
        most = max(most, len(_kept))
        while _kept:
            _kept.pop().close()
        await asyncio.sleep(0.1)
    return most


_READ = "import resource; print(*resource.getrlimit(resource.RLIMIT_CORE))"


@app.remote(gpu=CPU)
async def core_limits() -> list[str]:
    """The limits of this process, and of a program that it starts."""
    own = "{} {}".format(*resource.getrlimit(resource.RLIMIT_CORE))
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _READ, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await program.communicate()
    return [own, output.decode().strip()]


@celery.task
def plain_core_limit() -> list[int]:
    return list(resource.getrlimit(resource.RLIMIT_CORE))
