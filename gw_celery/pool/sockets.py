"""The sockets of a pool's children in one selector, beside a wake-up."""

from __future__ import annotations

import selectors
from collections.abc import Iterator

from gw_celery.pool import child_process, wakeup

Event = tuple[selectors.SelectorKey, int]


class Sockets:
    """Children that are listened to, and written to whenever their socket takes more."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wakeup = wakeup.Wakeup(self._selector)
        self._children: set[child_process.Child] = set()

    def fileno(self) -> int:
        """One descriptor that is readable when ``wait`` would return at once."""
        return self._selector.fileno()

    def wake(self) -> None:
        """End a ``wait``; from any thread."""
        self._wakeup.send()

    def wait(self, timeout: float) -> list[Event]:
        """Return what has happened, for ``follow``; the only part that needs no lock."""
        return self._selector.select(timeout)

    def follow(self, events: list[Event]) -> Iterator[child_process.Child]:
        """Write what can be written now, and yield the children that have something to read."""
        for key, mask in events:
            child = key.data
            if child is None:
                self._wakeup.receive()
                continue
            if mask & selectors.EVENT_WRITE:
                child.flush()
                self.watch(child)
            if mask & selectors.EVENT_READ:
                yield child

    def add(self, child: child_process.Child) -> None:
        self._children.add(child)
        self._selector.register(child, selectors.EVENT_READ, child)

    def remove(self, child: child_process.Child) -> None:
        """Forget a child; before its socket is closed."""
        self._children.remove(child)
        self._selector.unregister(child)

    def watch(self, child: child_process.Child) -> None:
        """Ask to be told when the socket takes more, only while there is more."""
        if child in self._children:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.wants_to_write else 0)
            if self._selector.get_key(child).events != events:
                self._selector.modify(child, events, child)

    def close(self) -> None:
        self._selector.close()
        self._wakeup.close()
