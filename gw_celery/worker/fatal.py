"""End a process that cannot serve, saying why; Celery would log a receiver's error and go on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

from gw_celery import errors

logger = logging.getLogger(__name__)

EX_FAILURE = 1
EX_CONFIG = 78


@contextlib.contextmanager
def fatal_errors(report: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
    """Turn any exception into a logged reason and ``SystemExit``.

    Args:
        report: called with the reason as text, too.
    """
    try:
        yield
    except Exception as exc:
        _log_causes(exc)
        report(str(exc))
        # Before logging is set up, or under a log level that hides it, somebody must see why.
        sys.stderr.write(f"gw_celery: {type(exc).__name__}: {exc}\n")
        code = EX_CONFIG if isinstance(exc, errors.ConfigurationError) else EX_FAILURE
        raise SystemExit(code) from exc


def _log_causes(exc: Exception) -> None:
    if isinstance(exc, errors.StartupError):
        for name, cause in exc.causes.items():
            logger.critical("%s failed to load in pid %d", name, os.getpid(), exc_info=cause)
    else:
        logger.critical("this worker cannot serve: %s", exc)
