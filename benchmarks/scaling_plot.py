"""A picture of a replayed trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gw_celery import errors
from gw_celery.simulate import cluster, runs, trace


@dataclasses.dataclass(frozen=True)
class Moment:
    """The cluster in one second."""

    at: float
    arrived: int
    waiting: int
    desired: int
    actual: int


class Recorder:
    """A policy that notes what it observes and decides each second."""

    on_arrival = False

    def __init__(self, scaler: cluster.Scaler) -> None:
        self._scaler = scaler
        self.moments: list[Moment] = []

    def desired(self, now: float, observation: cluster.Observation) -> int:
        desired, seen = self._scaler.desired(now, observation), observation
        self.moments.append(Moment(now, seen.arrived, seen.waiting, desired, seen.actual))
        return desired


def record(
    replayed: trace.Trace, scenario: cluster.Scenario
) -> tuple[cluster.Outcome, list[Moment]]:
    """Replay a trace through our policy, with the course of all nodes together."""
    recorders = [Recorder(scaler) for scaler in runs.our_policy(scenario)]
    outcome = runs.play(replayed, scenario, recorders)
    seconds = zip(*(recorder.moments for recorder in recorders), strict=False)
    return outcome, [
        dataclasses.replace(of_nodes[0], desired=sum(moment.desired for moment in of_nodes))
        for of_nodes in seconds
    ]


def require(path: Path) -> None:
    """Fail now, not after the work, when there is nothing to draw with, or no place for it.

    Raises:
        ConfigurationError: says which, and what to do.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise errors.ConfigurationError(
            "--plot draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    known = figure.Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise errors.ConfigurationError(
            f"--plot {path}: its ending says what kind of picture; known are {', '.join(known)}"
        )
    if not path.parent.is_dir():
        raise errors.ConfigurationError(
            f"--plot {path}: there is no directory {path.parent}: make it first"
        )


def draw(moments: Sequence[Moment], path: Path, title: str) -> None:
    """Arrivals, backlog, and the replicas that were desired and that there were, over time."""
    from matplotlib import figure

    at = [moment.at for moment in moments]
    arrived = [moment.arrived for moment in moments]
    sheet = figure.Figure(figsize=(10, 7), layout="constrained")
    above, middle, below = sheet.subplots(3, sharex=True)
    above.set_title(title)
    above.plot(at, [b - a for a, b in zip([0, *arrived], arrived, strict=False)], linewidth=0.6)
    above.set_ylabel("arrivals per second")
    middle.plot(at, [moment.waiting for moment in moments], color="tab:red", linewidth=0.8)
    middle.set_ylabel("inputs waiting")
    below.step(at, [moment.actual for moment in moments], where="post", label="actual")
    below.step(at, [moment.desired for moment in moments], "k:", where="post", label="desired")
    below.set_ylabel("replicas")
    below.set_xlabel("seconds")
    below.legend()
    for axes in (above, middle, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    sheet.savefig(path)
