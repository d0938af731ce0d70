"""A picture of a replayed trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gw_celery import errors
from gw_celery.autoscale.simulate import cluster


def require(path: Path) -> None:
    """Fail now, not after the work, when there is nothing to draw with, or no place for it.

    Raises:
        ConfigurationError: says which, and what to do.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise errors.ConfigurationError(
            "--plot draws with matplotlib, which is not installed: pip install 'gw-celery[plots]'"
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


def draw(moments: Sequence[cluster.Moment], path: Path, title: str) -> None:
    """Arrivals, backlog, and the replicas that were desired and that there were, over time."""
    from matplotlib import figure

    at = [one.at for one in moments]
    arrived = [one.arrived for one in moments]
    sheet = figure.Figure(figsize=(10, 7), layout="constrained")
    above, middle, below = sheet.subplots(3, sharex=True)
    above.set_title(title)
    above.plot(at, [b - a for a, b in zip([0, *arrived], arrived, strict=False)], linewidth=0.6)
    above.set_ylabel("arrivals per second")
    middle.plot(at, [one.waiting for one in moments], color="tab:red", linewidth=0.8)
    middle.set_ylabel("inputs waiting")
    below.step(at, [one.actual for one in moments], where="post", label="actual")
    below.step(at, [one.desired for one in moments], "k:", where="post", label="desired")
    below.set_ylabel("replicas")
    below.set_xlabel("seconds")
    below.legend()
    for one in (above, middle, below):
        one.set_ylim(bottom=0)
        one.grid(alpha=0.3)
    sheet.savefig(path)
