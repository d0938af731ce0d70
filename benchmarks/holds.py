"""How fast messages of a dead worker return, and what a frozen worker and refusals change.

    python -m benchmarks.holds kills [--rounds 50] [--ttl 15]
    python -m benchmarks.holds freezes [--rounds 20] [--ttl 5]
    python -m benchmarks.holds refusals [--seconds 12]

Redis is an embedded server. Counts come from an append-only file, and from the stored results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks import holds_app
from gw_celery import devserver

#: Inputs that one worker runs at a time, and holds besides.
SLOTS = 64
Server = devserver.Server


class Worker:
    """A worker with 64 slots, and its children."""

    def __init__(self, name: str, folder: Path, servers: tuple[Server, Server], ttl: float) -> None:
        self.node = f"{name}@bench"
        self.log = folder / f"{name}.log"
        env = {**os.environ, "LEDGER": str(folder / "ledger"), "TTL": str(ttl)}
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.holds_app:celery"]
        command += ["-b", servers[0].broker_url, "--result-backend", servers[1].result_url]
        command += ["worker", "-Q", "cpu", "-n", self.node, "-l", "INFO"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to the parent, then to the children."""
        parent = psutil.Process(self.process.pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def said(self, text: str) -> int:
        return self.log.read_text().count(text)


class Ledger:
    """What the bodies wrote: "B" or "E", the number of the input, the pid, the time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ledger"

    def lines(self, kind: str) -> list[list[str]]:
        text = self._path.read_text() if self._path.exists() else ""
        return [line.split() for line in text.splitlines() if line.startswith(kind)]

    def count(self, kind: str) -> Counter[str]:
        return Counter(line[1] for line in self.lines(kind))


def wait(is_done: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def held(server: Server, node: str) -> int:
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        return sum(client.hlen(key) for key in client.scan_iter(f"gw:hold:{node}:*"))


def kills(folder: Path, server: Server, options: argparse.Namespace) -> None:
    """Kill a worker with 64 inputs in flight and 64 more, again and again, beside another one."""
    control, ledger, ttl = holds_app.celery.control, Ledger(folder), options.ttl
    survivor = Worker("survivor", folder, (server, server), ttl)
    wait(lambda: survivor.said("ready."), 30, "the survivor is ready")
    control.cancel_consumer("cpu.once", destination=[survivor.node], reply=True)
    ready, delays, own = time.monotonic(), [], []
    for turn in range(options.rounds):
        victim = Worker(f"victim{turn}", folder, (server, server), ttl)
        sent = [holds_app.once.delay(f"{turn}-{number}", 600.0) for number in range(2 * SLOTS)]
        wait(lambda: held(server, victim.node) == len(sent), 30, "the victim holds all")
        wait(lambda: len(ledger.lines(f"B {turn}-")) == SLOTS, 30, "64 run")
        control.add_consumer("cpu.once", destination=[survivor.node], reply=True)
        busy = [holds_app.once.delay(f"s{turn}-{number}", 3.0) for number in range(16)]
        wait(lambda: len(ledger.lines(f"B s{turn}-")) == 16, 30, "the survivor's own run")
        wait(lambda: time.monotonic() > ready + ttl, ttl, "the survivor trusts its clock")
        killed = time.time()
        victim.kill()
        for one in sent:
            one.get(timeout=ttl + 30)
        ends = [float(line[3]) - killed for line in ledger.lines(f"E {turn}-")]
        delays += [ends]
        own += [one.get(timeout=30) for one in busy]
        control.cancel_consumer("cpu.once", destination=[survivor.node], reply=True)
        print(f"  {turn + 1}: first {min(ends):.1f} s, last {max(ends):.1f} s", flush=True)
    survivor.process.terminate()
    survivor.process.wait(60)
    last = sorted(max(one) for one in delays)
    names = [f"{turn}-{number}" for turn in range(options.rounds) for number in range(2 * SLOTS)]
    begun, ended = ledger.count("B"), ledger.count("E")
    once = [f"s{turn}-{number}" for turn in range(options.rounds) for number in range(16)]
    print(
        f"{options.rounds} kills, {len(names)} inputs of theirs: {sum(not ended[n] for n in names)} "
        f"lost; ended twice {sum(ended[n] > 1 for n in names)}; seconds to the last answer: median "
        f"{statistics.median(last):.1f}, p99 {last[min(len(last) - 1, int(0.99 * len(last)))]:.1f}, "
        f"largest {last[-1]:.1f}; {len(once)} inputs of the other worker: "
        f"{sum(begun[n] > 1 for n in once)} began twice"
    )


def freezes(folder: Path, server: Server, options: argparse.Namespace) -> None:
    """Freeze a worker for three ttl under load, again and again, and let it go on."""
    ledger, ttl = Ledger(folder), options.ttl
    two = [Worker(f"w{number}", folder, (server, server), ttl) for number in range(2)]
    for worker in two:
        wait(lambda w=worker: w.said("ready."), 30, "the workers are ready")
    time.sleep(ttl)
    changed, stored, errbacks = 0, 0, holds_app.noted.s().set(queue="cpu")
    for turn in range(options.rounds):
        frozen = two[turn % 2]
        lost = frozen.said("has declared this worker lost")
        sent = [
            holds_app.pace.apply_async((f"{turn}-{n}", 1.0), link_error=errbacks)
            for n in range(12 * SLOTS)
        ]
        wait(lambda: len(ledger.lines(f"E {turn}-")) > SLOTS, 60, "they run")
        frozen.signal(signal.SIGSTOP)
        end = time.monotonic() + 3 * ttl
        first = [one.get(timeout=6 * ttl + 60) for one in sent]
        time.sleep(max(0.0, end - time.monotonic()))
        frozen.signal(signal.SIGCONT)
        wait(lambda: frozen.said("has declared this worker lost") > lost, 30, "it knows")
        before = len(ledger.lines("E"))
        more = [holds_app.pace.delay(f"m{turn}-{n}", 0.5) for n in range(4 * SLOTS)]
        pids = {p.pid for p in psutil.Process(frozen.process.pid).children()}
        wait(
            lambda: any(int(line[2]) in pids for line in ledger.lines("E")[before:]),
            60,
            "it serves again",
        )
        for one in more:
            one.get(timeout=60)
        now = [holds_app.celery.AsyncResult(one.id).result for one in sent]
        changed += sum(a != b for a, b in zip(first, now, strict=True))
        stored += len(now)
        print(f"  {turn + 1}: done", flush=True)
    for worker in two:
        worker.process.terminate()
        worker.process.wait(60)
    begun = ledger.count("B")
    print(
        f"{options.rounds} freezes of {3 * ttl:.0f} s: {stored} results, {changed} changed later; "
        f"{len(ledger.lines('X'))} errbacks called; began twice {sum(c > 1 for c in begun.values())}; "
        f"holds left {sum(held(server, w.node) for w in two)}"
    )


@contextlib.contextmanager
def refused(server: Server, kind: str) -> Iterator[None]:
    """Make a server refuse commands."""
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        if kind == "OOM":
            client.config_set("maxmemory", 1)
            yield
            client.config_set("maxmemory", 0)
        elif kind == "READONLY":
            client.replicaof("127.0.0.1", "1")
            yield
            client.replicaof("NO", "ONE")
        elif kind == "BUSY":
            client.config_set("lua-time-limit", 1)
            busy = threading.Thread(target=_spin, args=(server,))
            busy.start()
            time.sleep(0.5)
            yield
            client.script_kill()
            busy.join()
        elif kind == "LOADING":
            for number in range(20):
                client.set(f"padding{number}", "")
            client.config_set("key-load-delay", 600_000)
            loading = threading.Thread(target=_reload, args=(server,))
            loading.start()
            yield
            loading.join()
            client.config_set("key-load-delay", 0)


def _spin(server: Server) -> None:
    with redis.Redis(unix_socket_path=str(server.socket)) as client:
        with contextlib.suppress(redis.ResponseError):
            client.eval("while true do end", 0)


def _reload(server: Server) -> None:
    with redis.Redis(unix_socket_path=str(server.socket), socket_timeout=120) as client:
        client.execute_command("DEBUG", "RELOAD")


def refusals(folder: Path, _: Server, options: argparse.Namespace) -> None:
    """Run 500 inputs, while the broker, the results or both refuse."""
    for kind in ("OOM", "READONLY", "BUSY", "LOADING"):
        for where in ((0,), (1,), (0, 1)):
            place = folder / f"{kind}{len(list(folder.iterdir()))}"
            place.mkdir()
            with contextlib.ExitStack() as stack:
                two = [stack.enter_context(devserver.running(place / name)) for name in ("b", "r")]
                servers = two[0], two[1]
                _refuse_one(place, servers, kind, where, options)


def _refuse_one(
    folder: Path,
    servers: tuple[Server, Server],
    kind: str,
    where: tuple[int, ...],
    options: argparse.Namespace,
) -> None:
    ledger = Ledger(folder)
    app = holds_app.celery
    app.conf.update(broker_url=servers[0].broker_url, result_backend=servers[1].result_url)
    vars(app._local).pop("backend", None)
    app._backend_cache = None
    worker = Worker("w", folder, servers, options.ttl)
    wait(lambda: worker.said("ready."), 30, "the worker is ready")
    with app.connection_for_write() as connection:
        sent = [
            holds_app.pace.apply_async((str(n), 0.5), connection=connection) for n in range(500)
        ]
    wait(lambda: len(ledger.lines("E")) > 100, 60, "they run")
    with contextlib.ExitStack() as stack:
        for number in where:
            stack.enter_context(refused(servers[number], kind))
        time.sleep(options.seconds)
    keys = [f"celery-task-meta-{one.id}" for one in sent]
    with redis.Redis(unix_socket_path=str(servers[1].socket), db=1) as client:
        with contextlib.suppress(SystemExit):
            wait(lambda: sum(v is not None for v in client.mget(keys)) == 500, 60, "all")
        done = sum(b'"SUCCESS"' in v for v in client.mget(keys) if v)
    is_alive = worker.process.poll() is None
    worker.process.terminate()
    worker.process.wait(60)
    names = "broker and results" if len(where) == 2 else ("broker", "results")[where[0]]
    began, places = ledger.count("B"), Counter(worker.log.read_text().split())
    print(
        f"{kind} for {options.seconds:.0f} s on {names}: {done} of 500, worker "
        f"{'alive' if is_alive else 'DEAD'}, {sum(began.values()) - 500} bodies in vain, "
        f"{places['ERROR/MainProcess]']} errors in its log",
        flush=True,
    )


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "freezes", "refusals"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--ttl", type=float)
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    options.rounds = options.rounds or {"kills": 50, "freezes": 20, "refusals": 1}[options.what]
    options.ttl = options.ttl or (5.0 if options.what == "freezes" else 15.0)
    with tempfile.TemporaryDirectory() as name, devserver.running(Path(name)) as server:
        holds_app.celery.conf.update(broker_url=server.broker_url, result_backend=server.result_url)
        measure = {"kills": kills, "freezes": freezes, "refusals": refusals}[options.what]
        folder = Path(name) / "run"
        folder.mkdir()
        measure(folder, server, options)


if __name__ == "__main__":
    main()
