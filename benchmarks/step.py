"""A real worker under a load step and a train of bursts: replicas over time, waits, starts.

    python -m benchmarks.step [--rate 5] [--plot step.svg] [--until-min]

The rate is x1 for 30 s, x8 for 60 s, x1 for 30 s, four times x8 for 10 s and x1 for 20 s, and
nothing at the end: for 10 s, or until the pool is back at its minimum, which takes as long as it
expects bursts to come again. Then the time from zero to an answer, in a worker that may go there.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import step_app
from gw_celery import devserver, testing
from gw_celery.testing import workers
from tests.processes import logged_at

#: Seconds and times the rate.
PHASES = [(30.0, 1), (60.0, 8), (30.0, 1), *[(10.0, 8), (20.0, 1)] * 4]
OPTIONS = ("--gpu", "CPU", "-l", "INFO")
_LONGEST = 900.0


class Watch:
    """What the worker has and what waits, twice a second."""

    def __init__(self, worker: testing.Worker) -> None:
        self.began = time.monotonic()
        #: Seconds, what came a second, what waits, replicas that are wanted and that are ready.
        self.seen: list[tuple[float, float, int, int, int]] = []
        self.rate = 0.0
        self._inspect = step_app.celery.control.inspect([worker.node], timeout=2, limit=1)
        self._node = worker.node
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.5):
            status = (self._inspect._request("gw_status") or {}).get(self._node)
            if status is None:
                continue
            services = status["scaling"]["services"].values()
            waits = sum(one["queued"] or 0 for one in services) + status["waiting"]
            ready = sum(one["state"] == "ready" for one in status["replicas"])
            now = time.monotonic() - self.began
            self.seen.append((now, self.rate, waits, len(status["replicas"]), ready))


def main() -> None:
    """Run both, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=5.0, help="inputs a second of x1")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    parser.add_argument("--until-min", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        devserver.running(Path(folder) / "server") as server,
        workers.talking_to(server),
    ):
        os.environ["LEDGER"] = str(Path(folder) / "ledger")
        _step(options, server, Path(folder))
        _zero(server, Path(folder))


def _worker(server: devserver.Server, folder: Path, *more: str) -> testing.Worker:
    return testing.Worker(
        "benchmarks.step_app:celery",
        *OPTIONS,
        *more,
        broker_url=server.broker_url,
        result_url=server.result_url,
        log_dir=folder,
        command=("gw", "worker"),
    )


def _step(options: argparse.Namespace, server: devserver.Server, folder: Path) -> None:
    worker = _worker(server, folder)
    try:
        worker.wait_ready()
        watch = Watch(worker)
        sent = _send(options.rate, watch)
        drained = _drain(folder / "ledger", sent)
        while options.until_min and watch.seen[-1][3] > 1:
            if time.monotonic() - watch.began > _LONGEST:
                break
            time.sleep(1.0)
        watch.end()
    finally:
        worker.stop()
    _report(folder / "ledger", sent, drained, watch)
    for line in worker.log_text().splitlines():
        if " replicas: " in line:
            print("   ", line)
    if options.plot:
        options.plot.write_text(_drawn(watch))


def _send(rate: float, watch: Watch) -> int:
    """Send as the phases say; returns how many inputs that were."""
    model, number = step_app.Model(), 0
    for seconds, times in PHASES:
        watch.rate = rate * times
        end = time.monotonic() + seconds
        due = time.monotonic()
        while due < end:
            model.infer.delay(number, time.monotonic())
            number += 1
            due += 1 / watch.rate
            time.sleep(max(0.0, due - time.monotonic()))
    watch.rate = 0.0
    return number


def _drain(ledger: Path, sent: int) -> float:
    """Seconds until all that was sent has ended."""
    began = time.monotonic()
    while len(list(_lines(ledger, "E"))) < sent and time.monotonic() - began < 60:
        time.sleep(0.2)
    return time.monotonic() - began


def _lines(ledger: Path, word: str) -> Iterator[list[str]]:
    for line in ledger.read_text().splitlines():
        if line.startswith(word):
            yield line.split()[1:]


def _report(ledger: Path, sent: int, drained: float, watch: Watch) -> None:
    ended = collections.Counter(number for number, _ in _lines(ledger, "E"))
    waits = sorted(float(wait) for _, wait in _lines(ledger, "E"))
    figures = {
        "sent": sent,
        "lost": sent - len(ended),
        "twice": sum(count > 1 for count in ended.values()),
        "starts": len(list(_lines(ledger, "S"))),
        "most replicas": max(one[3] for one in watch.seen),
        "replicas at the end": watch.seen[-1][3],
        "seconds until back": round(watch.seen[-1][0]),
        "step: most that waited": max(one[2] for one in watch.seen),
        "step: seconds until none waited": round(_gone(watch)),
        "drained after the last": round(drained, 1),
        "p50 wait": waits[len(waits) // 2],
        "p99 wait": waits[len(waits) * 99 // 100],
        "longest wait": waits[-1],
    }
    print(json.dumps(figures))


def _gone(watch: Watch) -> float:
    """Seconds from the step up until what it piled up was gone."""
    step = sum(seconds for seconds, _ in PHASES[:1])
    piled = [one for one in watch.seen if step < one[0] < step + 90 and one[2] > 10]
    return piled[-1][0] - step if piled else 0.0


def _zero(server: devserver.Server, folder: Path) -> None:
    """Wait until nothing is loaded, and time the first answer."""
    os.environ["INACTIVITY"] = "5"
    worker = _worker(server, folder, "--autoscale", "4,0")
    try:
        worker.wait_ready()
        testing.eventually(lambda: not worker.replicas(), 60)
        began = time.time()
        step_app.Model().infer.delay(0, time.monotonic()).get(timeout=60)
        answered = time.time() - began
        noticed = logged_at(worker, "from 0 to 1 replicas")
        start_up = logged_at(worker, "is ready\n") - noticed
        figures = {
            "from zero": answered,
            "of that until it was noticed": noticed - began,
            "and until a replica was ready": start_up,
            "over start-up": answered - start_up,
        }
        print(json.dumps({name: round(seconds, 2) for name, seconds in figures.items()}))
    finally:
        worker.stop()


def _drawn(watch: Watch) -> str:
    """An SVG of what came, what waited, and the replicas."""
    wide, high = 900, 120
    last = watch.seen[-1][0]
    columns = [("inputs a second", 1), ("inputs that wait", 2), ("replicas, ready in green", 3)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide + 60} {3 * (high + 40)}" '
        f'font-family="sans-serif" font-size="12">'
    ]
    for row, (title, column) in enumerate(columns):
        top = row * (high + 40) + 20
        most = max(1.0, *(one[column] for one in watch.seen))
        parts.append(f'<text x="40" y="{top - 6}">{title}, at most {most:g}</text>')
        lines = [(column, "#2060a0")] + ([(4, "#20a040")] if column == 3 else [])
        for shown, colour in lines:
            # A step, not a slope; what does not change needs no points.
            path, before = "M40 " + f"{top + high}", -1.0
            for one in watch.seen:
                if one[shown] != before:
                    before = one[shown]
                    path += (
                        f"H{40 + wide * one[0] / last:.1f}V{top + high * (1 - before / most):.0f}"
                    )
            parts.append(f'<path fill="none" stroke="{colour}" d="{path}H{40 + wide}"/>')
        parts.append(f'<path d="M40 {top}V{top + high}H{40 + wide}" fill="none" stroke="#888"/>')
    for second in range(0, int(last) + 1, 60):
        place = 40 + wide * second / last
        parts.append(f'<text x="{place:.0f}" y="{3 * (high + 40) - 6}">{second} s</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
