"""The embedded server: a Redis or Valkey of one's own on a unix socket, its data kept.

``python -m gw_celery.devserver DATA_DIR`` runs one in the foreground and prints its URLs.
"""

from __future__ import annotations

from gw_celery.devserver.program import find_program
from gw_celery.devserver.server import Server, running, start

__all__ = ["Server", "find_program", "running", "start"]
