"""Finds the module that defines a Celery app, in the parent, so that a child can import it."""

from __future__ import annotations

import pickle
import sys

from celery import Celery

from gw_celery import errors

#: Modules that may hold an app without having created it.
_NOT_USERS = ("__mp_main__", "celery", "kombu", "gw_celery", "gw_celery_django", "click", "_pytest")


def find(app: Celery) -> str:
    """Return ``module:attribute`` of ``app``, the form that ``celery -A`` takes.

    Raises:
        ConfigurationError: if no importable module has the app as a global.
    """
    found = []
    for known_as, module in list(sys.modules.items()):
        name = known_as
        if name == "__main__":
            # A child imports the main module by its real name.
            spec = getattr(module, "__spec__", None)
            name = spec.name if spec is not None else ""
        if name and name.partition(".")[0] not in _NOT_USERS:
            namespace = list(getattr(module, "__dict__", {}).items())
            variables = [variable for variable, value in namespace if value is app]
            found += [(_rank(name, variable, app), f"{name}:{variable}") for variable in variables]
    if not found:
        raise errors.ConfigurationError(
            f"no module has the Celery app {app.main!r} as a global, so a child of the pool cannot "
            f"import it: assign it in a module, as in proj/celery.py: app = Celery(...), "
            f"and start the worker with `celery -A proj worker`"
        )
    return min(found)[1]


def changes(app: Celery) -> bytes:
    """Return the settings that this process changed, pickled, as far as they can be."""
    given: dict[str, object] = {}
    for key, value in app.__reduce_keys__()["changes"].items():
        try:
            pickle.dumps(value)
        except Exception:  # a function or a lock; the child's import creates its own
            continue
        given[key] = value
    return pickle.dumps(given)


def _rank(module: str, name: str, app: Celery) -> tuple[bool, bool, bool, int]:
    """Prefer the usual places of an app; every candidate gives the same object."""
    made_here = module == app.main or module.rpartition(".")[2] in ("celery", "celery_app")
    return (not made_here, name not in ("app", "celery", "celery_app"), "." in name, len(module))
