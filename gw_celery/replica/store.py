"""Keeps scores on this machine, one file each, for the workers that come after.

Workers share the folder: a file appears whole or not at all, and whoever writes takes away the
oldest. What is in it is a hint that costs a measurement where it is wrong: nothing here ever fails
a replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from gw_celery.policy import scores as policy_scores
from gw_celery.protocol import snapshot

logger = logging.getLogger(__name__)

#: Files that a folder keeps at most.
_MOST = 500
#: A score is a few hundred bytes for each of its rounds, of which there are 10,000 at most.
_LARGEST_BYTES = 1024 * 1024
#: Seconds after which what a writer left behind is nobody's.
_STALE = 3600.0
_BEGUN = ".new"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A score, and how many seconds ago it was measured."""

    score: snapshot.TaskScore
    age: float


class Store:
    """The scores in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, fingerprint: str) -> Kept | None:
        """Return what was kept; ``None`` when there is nothing, or nothing that can be used."""
        path = self._path(fingerprint)
        try:
            return _read(path, fingerprint)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            logger.warning("the score in %s is ignored, and measured again: %s", path, exc)
            return None

    def keep(self, fingerprint: str, measured: snapshot.TaskScore) -> None:
        """Write a score that was measured just now, in the place of an older one."""
        written = {
            "fingerprint": fingerprint,
            "measured_at": time.time(),
            "score": policy_scores.to_json(measured),
        }
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(fingerprint), json.dumps(written))
            self._tidy()
        except OSError as exc:
            logger.warning(
                "the score of %s cannot be kept in %s (setting gw_score_cache), so that every "
                "replica measures it: %s",
                measured.task,
                self._folder,
                exc,
            )

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint}.json"

    def _tidy(self) -> None:
        """Take away the oldest scores over the limit, and what broken writers left."""
        stale = time.time() - _STALE
        found = [(_modified(file), file) for file in self._folder.iterdir()]
        scores = sorted(one for one in found if one[1].suffix == ".json")
        left = [one for one in found if one[1].suffix == _BEGUN and one[0] < stale]
        for _, file in [*scores[: max(0, len(scores) - _MOST)], *left]:
            file.unlink(missing_ok=True)


def _modified(file: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # another worker tidied, too
        return file.lstat().st_mtime
    return 0.0


def _read(path: Path, fingerprint: str) -> Kept:
    # Not through a link, and nothing that another user put there.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise ValueError("it belongs to another user")
        text = file.read(_LARGEST_BYTES + 1)
    if len(text) > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES} bytes")
    given: Any = policy_scores.loads(text.decode())
    if not isinstance(given, dict) or given.get("fingerprint") != fingerprint:
        raise ValueError("it is none of ours")
    measured_at = policy_scores.figure(given.get("measured_at"))
    if measured_at is None:
        raise ValueError("it does not say when it was measured")
    return Kept(
        score=policy_scores.from_json(given.get("score")), age=max(0.0, time.time() - measured_at)
    )


def _write(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(_BEGUN, dir=path.parent)  # for its owner alone
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
