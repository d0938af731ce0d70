"""An append-only file that says what happened, in which process, however that process ended."""

from __future__ import annotations

import os
from pathlib import Path


def write(*words: object) -> None:
    """Append one line in one write, so that processes do not mix theirs."""
    line = " ".join(map(str, (os.getpid(), *words))) + "\n"
    with Path(os.environ["LEDGER"]).open("a") as ledger:
        ledger.write(line)


def read(path: Path) -> list[list[str]]:
    """The lines so far, each as its words; the first is the pid."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def words(path: Path, word: str) -> list[list[str]]:
    """The lines whose second word is ``word``."""
    return [line for line in read(path) if line[1] == word]
