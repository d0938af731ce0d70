"""Run the Python blocks of a page of the documentation: ``python -m tests.run_page PAGE``.

The blocks run one after the other in one module, ``proj.tasks``, which has ``gw`` and
``celery_app``. Celery runs in eager mode over memory://. A block may ``await`` outside of a
function. A block that begins with ``# NAME.py`` is written to that file of the current directory
and imported instead; ``tests/integration/test_testing.py`` runs those that are pytest's.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import celery
import django.conf
from celery.app import defaults

import gw_celery as gw

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+)\.py\b")


def main(page: Path) -> None:
    sys.addaudithook(_refuse_network)
    sys.path.insert(0, os.getcwd())
    defaults.DEFAULTS["task_always_eager"] = True
    os.environ |= {"CELERY_BROKER_URL": "memory://", "CELERY_RESULT_BACKEND": "cache+memory://"}
    django.conf.settings.configure()
    module = _module()
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if name := FILE.match(block[1]):
            _write(name[1], block[1], vars(module))
        else:
            _run("\n" * line + block[1], str(page), vars(module))


def _module() -> types.ModuleType:
    package, module = types.ModuleType("proj"), types.ModuleType("proj.tasks")
    sys.modules |= {"proj": package, "proj.tasks": module}
    celery_app = celery.Celery("proj")
    gw.preset(celery_app)
    vars(module).update(gw=gw, celery_app=celery_app)
    return module


def _write(name: str, code: str, namespace: dict[str, Any]) -> None:
    compile(code, f"{name}.py", "exec")
    Path(f"{name}.py").write_text(code)
    if name != "conftest" and not name.startswith("test_"):
        importlib.invalidate_caches()
        namespace.update(vars(importlib.import_module(name)))


def _run(code: str, page: str, namespace: dict[str, Any]) -> None:
    compiled = compile(code, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    made = types.FunctionType(compiled, namespace)()  # a coroutine, where the block awaits
    if inspect.iscoroutine(made):
        asyncio.run(made)


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(args[1], tuple):
        raise OSError(f"a page of the documentation connects to {args[1]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
