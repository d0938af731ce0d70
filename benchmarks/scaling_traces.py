"""Arrivals of many kinds, made from a seed, and versions of a trace that is given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from gw_celery.simulate.trace import Trace

HOUR = 3_600
Rate = Callable[[int], float]
Draw = Callable[[random.Random], float]


def synthetic() -> dict[str, Trace]:
    """Traces of an hour; workloads as of a language model, at 2,000 a second a replica."""
    return {
        "steady": poisson(1, lambda _: 2.5, lognormal(2300, 0.8)),
        "steady x4": poisson(2, lambda _: 10, lognormal(2300, 0.8)),
        "chat": poisson(3, wandering(3, 5.4, 0.05), lognormal(3265, 1.0)),
        "chat, restless": poisson(4, wandering(4, 5.4, 0.12), lognormal(3265, 1.0)),
        "diurnal": poisson(5, lambda at: 3 + 2.8 * math.sin(at / 286), lognormal(2300, 0.8)),
        "ramp": poisson(6, lambda at: 0.3 + at / 360, lognormal(2300, 0.8)),
        "on/off 60 s": poisson(7, switching(7, 10, 0.5, 60, 120), lognormal(2300, 0.8)),
        "on/off 10 s": poisson(8, switching(8, 20, 1, 10, 60), lognormal(2300, 0.8)),
        "spikes": poisson(9, spiking(9, 1, 30, 60), lognormal(2300, 0.8)),
        "heavy-tailed": poisson(10, lambda _: 2.5, pareto(1000, 1.3, 2e5)),
        "sparse": poisson(11, lambda _: 0.02, lognormal(6000, 1.0)),
    }


def versions(name: str, trace: Trace) -> dict[str, Trace]:
    """A trace; its halves; in other time and size; backwards; and its minutes in other orders."""
    end, middle = trace.seconds, trace.seconds / 2
    return {
        name: trace,
        f"{name}, 1st half": kept(trace, lambda at: at < middle),
        f"{name}, 2nd half": kept(trace, lambda at: at >= middle),
        f"{name}, half as fast": changed(trace, lambda at: at * 2),
        f"{name}, twice as fast": changed(trace, lambda at: at / 2),
        f"{name}, workload x3": changed(trace, lambda at: at, 3.0),
        f"{name}, workload x0.3": changed(trace, lambda at: at, 0.3),
        f"{name}, backwards": changed(trace, lambda at: end - at),
        f"{name}, shuffled 60 s": shuffled(trace, 60, 1),
        f"{name}, shuffled 120 s": shuffled(trace, 120, 2),
        f"{name}, shuffled 300 s": shuffled(trace, 300, 3),
    }


def poisson(seed: int, rate: Rate, workload: Draw) -> Trace:
    lot = random.Random(seed)
    most = max(rate(second) for second in range(HOUR))
    found, at = [], 0.0
    while (at := at + lot.expovariate(most)) < HOUR:
        if lot.random() < rate(int(at)) / most:
            found.append((at, workload(lot)))
    return ordered(found)


def lognormal(mean: float, variation: float) -> Draw:
    spread = math.log(1 + variation * variation)
    return lambda lot: lot.lognormvariate(math.log(mean) - spread / 2, math.sqrt(spread))


def pareto(least: float, shape: float, most: float) -> Draw:
    return lambda lot: min(most, least * lot.paretovariate(shape))


def wandering(seed: int, mean: float, step: float) -> Rate:
    lot, level, levels = random.Random(seed), 0.0, []
    for _ in range(HOUR // 20):
        level = 0.95 * level + lot.gauss(0, step)
        levels.append(mean * math.exp(level))
    return lambda at: levels[at // 20]


def switching(seed: int, high: float, low: float, on: float, off: float) -> Rate:
    lot, rates, is_on = random.Random(seed), list[float](), False
    while len(rates) < HOUR:
        rates += [high if is_on else low] * max(1, int(lot.expovariate(1 / (on if is_on else off))))
        is_on = not is_on
    return lambda at: rates[at]


def spiking(seed: int, base: float, gap: float, size: float) -> Rate:
    lot, rates, at = random.Random(seed), [base] * HOUR, 0.0
    while (at := at + lot.expovariate(1 / gap)) < HOUR:
        count, seconds = size * min(8, lot.paretovariate(1.5)), lot.choice([2, 3, 5, 10, 20])
        for second in range(int(at), min(HOUR, int(at) + seconds)):
            rates[second] += count / seconds
    return lambda at: rates[at]


def ordered(found: list[tuple[float, float]]) -> Trace:
    found.sort()
    first = found[0][0]
    return Trace([at - first for at, _ in found], [workload for _, workload in found])


def kept(trace: Trace, is_kept: Callable[[float], bool]) -> Trace:
    pairs = zip(trace.times, trace.workloads, strict=True)
    return ordered([(at, workload) for at, workload in pairs if is_kept(at)])


def changed(trace: Trace, when: Callable[[float], float], factor: float = 1.0) -> Trace:
    pairs = zip(trace.times, trace.workloads, strict=True)
    return ordered([(when(at), workload * factor) for at, workload in pairs])


def shuffled(trace: Trace, seconds: int, seed: int) -> Trace:
    """As many pieces of that length as there are, each drawn anew."""
    lot, pieces = random.Random(seed), int(trace.seconds // seconds)
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at, workload in zip(trace.times, trace.workloads, strict=True):
        blocks.setdefault(int(at // seconds), []).append((at % seconds, workload))
    return ordered(
        [
            (place * seconds + offset, workload)
            for place in range(pieces)
            for offset, workload in blocks.get(lot.randrange(pieces), [])
        ]
    )
