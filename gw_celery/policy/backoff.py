"""The delays between attempts of a failing operation; pure, in any process."""

from __future__ import annotations


class Backoff:
    """Delays that double from ``first`` to ``longest`` seconds, until ``reset``."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def reset(self) -> None:
        self._next = self._first

    def next(self) -> float:
        delay, self._next = self._next, min(2 * self._next, self._longest)
        return delay
