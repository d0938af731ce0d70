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
        if logging.getLogger().hasHandlers():
            log_causes(exc)
        else:  # Celery has not set up logging yet
            sys.stderr.write(f"gw_celery: {type(exc).__name__}: {exc}\n")
        report(str(exc))
        code = EX_CONFIG if isinstance(exc, errors.ConfigurationError) else EX_FAILURE
        raise SystemExit(code) from exc


def log_causes(exc: BaseException) -> None:
    """Log that this process cannot serve, and each class that failed to load with its traceback."""
    logger.critical("pid %d cannot serve: %s", os.getpid(), exc)
    if isinstance(exc, errors.StartupError):
        for name, cause in exc.causes.items():
            logger.error("%s failed to load", name, exc_info=cause)
