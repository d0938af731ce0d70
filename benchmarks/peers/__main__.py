"""The GPU pool against what people serve models with today, on one machine, in turn.

    python -m benchmarks.peers [--quick] [--systems ours prefork ...] [--workloads slow fast ...]
                               [--rounds 5] [--seconds 10] [--out DIR] [--docs]
    python -m benchmarks.peers --from DIR/results.json [--docs]

In each round each system serves each workload once, alone on the machine, in an order that moves
on by one: a change of the machine's speed touches all alike. One client process keeps the calls in
flight. Systems that cannot run beside ours get virtual environments below .cache/peers; one that
cannot be installed, or fails, is reported with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import bench, figures, report, systems, venvs, workloads
from gw_celery import devserver


def main() -> None:
    """Measure, or read what was measured, and print or write it."""
    options = _options()
    if options.source:
        result = report.Result(**json.loads(options.source.read_text()))
    else:
        result = _measured(options)
    print(report.text(result))
    if options.out:
        report.save(result, options.out)
    if options.docs:
        report.document(result, systems.ROOT / "docs")


def _options() -> argparse.Namespace:
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lines)
    every, work = list(systems.SYSTEMS), list(workloads.WORKLOADS)
    parser.add_argument("--systems", nargs="+", default=every, choices=every, metavar="NAME")
    parser.add_argument("--workloads", nargs="+", default=work, choices=work, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, in each run")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds before, at most")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md, peers.svg")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md")
    parser.add_argument("--from", dest="source", type=Path, help="results.json of another run")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.warm_up = 1, 2.0, 5.0
    return options


def _measured(options: argparse.Namespace) -> report.Result:
    result = report.Result(command=_command(options), machine=_machine())
    _install(options.systems, result)
    with (
        tempfile.TemporaryDirectory() as folder,
        devserver.running(Path(folder) / "data") as server,
    ):
        place = bench.Bench(Path(folder), server, options.seconds, options.warm_up)
        for number in range(options.rounds):
            for name in options.workloads:
                _round(number, workloads.WORKLOADS[name], place, options.systems, result)
    return result


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this run, without the paths of its files."""
    parts = ["python", "-m", "benchmarks.peers"]
    for name, every in (("systems", systems.SYSTEMS), ("workloads", workloads.WORKLOADS)):
        if (chosen := getattr(options, name)) != list(every):
            parts += [f"--{name}", *chosen]
    parts += ["--rounds", f"{options.rounds}", "--seconds", f"{options.seconds:g}"]
    return shlex.join([*parts, "--warm-up", f"{options.warm_up:g}"])


def _install(names: list[str], result: report.Result) -> None:
    for name in names:
        system = systems.SYSTEMS[name]
        distributions = [one.split("==")[0].split("[")[0] for one in system.requirements]
        try:
            found = venvs.versions(system.interpreter(), distributions or ["celery", "kombu"])
        except venvs.Unavailable as exc:
            result.failures[name] = f"not installed: {exc}"
        else:
            result.versions[name] = ", ".join(f"{key} {found[key]}" for key in found)


def _round(
    number: int,
    workload: workloads.Workload,
    place: bench.Bench,
    names: list[str],
    result: report.Result,
) -> None:
    """Measure what still works; in round ``number``, the order begins with its system."""
    order = names[number % len(names) :] + names[: number % len(names)]
    if workload.name == "minilm":
        _note(result, workload, figures.ALONE, number, place.alone(workload))
    for name in order:
        if name in result.failures or f"{name}, {workload.name}" in result.failures:
            continue
        try:
            measured = place.run(systems.SYSTEMS[name], workload)
        except bench.RunFailed as exc:
            result.failures[f"{name}, {workload.name}"] = str(exc)
            print(f"{workload.name} {name}: {exc}", file=sys.stderr)
        else:
            _note(result, workload, name, number, measured)


def _note(
    result: report.Result,
    workload: workloads.Workload,
    system: str,
    number: int,
    measured: dict[str, float],
) -> None:
    result.runs.append(
        {"workload": workload.name, "system": system, "round": number + 1, **measured}
    )
    print(f"round {number + 1} {workload.name} {system}: {measured['rate']:.1f}/s", file=sys.stderr)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{cores} cores, {memory:.0f} GiB, {platform.system()}, Python {python}"


if __name__ == "__main__":
    main()
