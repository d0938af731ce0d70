"""The rules of the layout that a machine can check: floors, the web wall, purity, the budget."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

#: From the ground up; imports go down or sideways. ARCHITECTURE.md says what each folder is.
FLOORS = (
    "background_thread errors types conf",
    "declare codec protocol",
    "policy",
    "transport gpus",
    "cluster",
    "app client signals gw_celery",
    "runtime",
    "replica worker",
    "pool",
    "autoscale devserver simulate",
    "testing contrib cli gw_celery_django",
)
RANK = {folder: rank for rank, folders in enumerate(FLOORS) for folder in folders.split()}
#: Imports inside functions that go up: any process may become a worker, or run a body eagerly.
LAZY_UPWARD = {("signals", "worker"), ("client", "runtime")}
#: Folders that must not import each other although they stand on one floor.
APART = {("worker", "replica"), ("replica", "worker")}
#: Modules that decide and touch nothing: ``now`` is an argument.
PURE = ("policy", "pool.replica", "pool.request_table")
IMPURE = {"asyncio", "redis", "socket", "subprocess", "threading", "time"}
#: Lines of gw_celery/. Raised only by name, in a commit that says why.
BUDGET = 20_500
#: Our modules behind `import gw_celery`, a declaration and one `.delay()`.
WEB_MODULES = 45


@functools.cache
def modules() -> dict[str, ast.Module]:
    files = [*(ROOT / "gw_celery").rglob("*.py"), *(ROOT / "django_app").rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        .removesuffix(".__init__")
        .removeprefix("django_app."): ast.parse(file.read_text())
        for file in sorted(files)
    }


def folder(name: str) -> str:
    return name.removeprefix("gw_celery.").split(".")[0]


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what is only imported for types may point upwards."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from running(node)


def imports(name: str) -> Iterator[str]:
    for node in running(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (target if target in modules() else node.module for target in full)


def test_imports_go_down_or_sideways_and_never_up() -> None:
    edges = {(name, target) for name in modules() for target in imports(name)}
    pairs = {(folder(a), folder(b)): (a, b) for a, b in edges if b in modules()}
    upward = {pair for pair in pairs if RANK[pair[1]] > RANK[pair[0]]} - LAZY_UPWARD
    assert {pair: pairs[pair] for pair in upward | (APART & set(pairs))} == {}
    inside = {name for name, target in edges if target == "gw_celery"}
    assert {name for name in inside if name.startswith("gw_celery.")} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for name in graph:
        below = (one for one in imports(name) if (folder(name), folder(one)) not in LAZY_UPWARD)
        graph[name].update(target for target in below if target in graph)
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_modules_that_decide_touch_no_clock_thread_or_socket() -> None:
    pure = [name for name in modules() if name.removeprefix("gw_celery.").startswith(PURE)]
    assert len(pure) > len(PURE)
    touched = [(name, target) for name in pure for target in imports(name)]
    assert [edge for edge in touched if edge[1].split(".")[0] in IMPURE] == []


@pytest.mark.parametrize("then", ["", "app.remote(body).delay(1)"])
def test_a_web_process_loads_little_of_ours_and_nothing_heavy(then: str) -> None:
    code = (
        "import sys; from celery import Celery; import gw_celery as gw\n"
        "celery = Celery('x', broker='memory://', backend='cache+memory://')\n"
        "app = gw.App('x', celery=celery)\n"
        f"async def body(x): ...\n{then}\nprint(*sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    loaded = done.stdout.split()
    tops = {name.split(".")[0] for name in loaded}
    assert tops & {"flower", "prometheus_client", "pynvml", "torch", "tornado"} == set()
    ours = [name for name in loaded if name.split(".")[0] == "gw_celery"]
    assert {"runtime", "replica", "worker", "pool"} & {folder(name) for name in ours} == set()
    assert len(ours) <= WEB_MODULES


def test_the_package_stays_within_its_budget() -> None:
    files: list[Path] = list((ROOT / "gw_celery").rglob("*.py"))
    assert sum(file.read_text().count("\n") for file in files) <= BUDGET
