"""The house rules that a machine can check: floors, cycles, front doors, sizes."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

#: The longest prefix that fits a module names its floor (ARCHITECTURE.md has the table).
FLOORS = {
    "gw_celery": 6,
    "gw_celery.errors": 0,
    "gw_celery.types": 0,
    "gw_celery.backoff": 1,
    "gw_celery.conf": 1,
    "gw_celery.figures": 1,
    "gw_celery.headers": 1,
    "gw_celery.snapshot": 1,
    "gw_celery.declare": 1,
    "gw_celery.pool.wire": 1,
    "gw_celery.pool.allotment": 1,
    "gw_celery.pool.devices": 1,
    "gw_celery.pool.machine": 1,
    "gw_celery.batching": 2,
    "gw_celery.pool.admission": 2,
    "gw_celery.pool.bands": 2,
    "gw_celery.pool.claims": 2,
    "gw_celery.pool.early": 2,
    "gw_celery.pool.letters": 2,
    "gw_celery.pool.replica": 2,
    "gw_celery.pool.tally": 2,
    "gw_celery.probes.status": 2,
    "gw_celery.benchmarks.score": 2,
    "gw_celery.autoscale.facts": 2,
    "gw_celery.autoscale.outlook": 2,
    "gw_celery.benchmarks.live": 2,
    "gw_celery.autoscale.policy": 2,
    "gw_celery.autoscale.seats": 2,
    "gw_celery.autoscale.startup": 2,
    "gw_celery.codec": 2,
    "gw_celery.runtime": 3,
    "gw_celery.pool.child": 3,
    "gw_celery.app": 4,
    "gw_celery.calling": 4,
    "gw_celery.pool": 4,
    "gw_celery.sweeps": 4,
    "gw_celery.worker": 4,
    "gw_celery.autoscale": 5,
    "gw_celery.probes": 5,
    "gw_celery.benchmarks": 3,
    "gw_celery.testing": 5,
    "gw_celery.devserver": 5,
    "gw_celery.cli": 6,
    "gw_celery.cli_worker": 6,
    "gw_celery.contrib": 6,
    "gw_celery_django": 6,
}
CELERY = {"amqp", "billiard", "celery", "kombu", "redis", "vine"}
#: What each floor may import beside the standard library, ourselves and the floors below.
ALLOWED = {
    0: set[str](),
    1: {"pynvml"},
    2: {"kombu"},
    3: {"billiard", "celery", "cloudpickle", "greenlet", "kombu", "redis"},
    4: {*CELERY, "cloudpickle", "psutil"},
    5: {*CELERY, "matplotlib", "psutil", "pytest"},
    6: {*CELERY, "click", "django", "flower", "opentelemetry", "prometheus_client", "tornado"},
}
#: Floor 2 decides and touches nothing: ``now`` is an argument.
IMPURE = {"asyncio", "concurrent", "multiprocessing", "socket", "subprocess", "threading", "time"}

PACKAGES = {"gw_celery": ROOT, "gw_celery_django": ROOT / "django_app"}
SIZED = [ROOT / "gw_celery", ROOT / "django_app", ROOT / "example_project"]


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "migrations" not in path.parts)


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {
        module_name(path, root): ast.parse(path.read_text())
        for package, root in PACKAGES.items()
        for path in python_files(root / package)
    }


def packages() -> list[str]:
    """The modules that are an ``__init__.py``."""
    files = (PACKAGES[name.split(".")[0]].joinpath(*name.split(".")) for name in modules())
    return [name for name, file in zip(modules(), files, strict=True) if file.is_dir()]


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what is only imported for types may point upwards."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from statements(node)


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted name of everything that ``tree`` imports, modules resolved."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full in modules() else source


def ours(tree: ast.Module) -> set[str]:
    return {name for name in imports(tree) if name.split(".")[0] in PACKAGES}


def floor(name: str) -> int:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        # The front door's own entry is no prefix: a new module has to be given a floor.
        if prefix in FLOORS and (prefix != "gw_celery" or prefix == name):
            return FLOORS[prefix]
    raise AssertionError(f"{name} has no floor: add it to FLOORS and to ARCHITECTURE.md")


def test_imports_go_down_or_sideways_and_never_up() -> None:
    upward = [
        f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        for name, tree in modules().items()
        for target in ours(tree)
        if floor(target) > floor(name)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    circle: list[str] = []
    try:
        TopologicalSorter({name: ours(tree) for name, tree in modules().items()}).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_nobody_inside_imports_the_front_door() -> None:
    inside = {name: tree for name, tree in modules().items() if name.startswith("gw_celery.")}
    assert [name for name, tree in inside.items() if "gw_celery" in ours(tree)] == []


def test_each_floor_imports_only_the_libraries_that_it_may() -> None:
    foreign = [
        f"{name} (floor {floor(name)}) imports {target}"
        for name, tree in modules().items()
        for target in imports(tree)
        if (top := target.split(".")[0]) not in sys.stdlib_module_names
        and top not in PACKAGES
        and top not in ALLOWED[floor(name)]
    ]
    assert foreign == []


def test_what_runs_in_a_replica_knows_nothing_of_celerys_worker() -> None:
    edge = [
        name
        for name, tree in modules().items()
        if floor(name) <= 3 and any(target.startswith("celery.worker") for target in imports(tree))
    ]
    assert edge == []


def test_modules_that_decide_touch_no_clock_thread_or_socket() -> None:
    impure = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in imports(tree)
        if floor(name) == 2 and target.split(".")[0] in IMPURE
    ]
    assert impure == []


def test_only_conf_reads_the_environment() -> None:
    readers = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in {"environ", "getenv"}
        and name != "gw_celery.conf"
    ]
    assert readers == []


def test_no_deadline_is_taken_from_a_clock_that_can_jump() -> None:
    # kombu's index of unacknowledged messages is in wall-clock time, for all workers of a broker;
    # so is what a sender says of when its input expires and since when it waits.
    may = {
        "gw_celery.runtime.expiry",
        "gw_celery.runtime.lateness",
        "gw_celery.worker.redis_transport",
    }
    readers = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node)
        in {"time.time", "datetime.now", "datetime.datetime.now", "dt.datetime.now"}
    }
    assert readers == may


@pytest.mark.parametrize("name", packages())
def test_a_front_door_lists_exactly_what_it_offers(name: str) -> None:
    listed: list[str] = []
    bound: set[str] = set()
    for node in modules()[name].body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                listed = ast.literal_eval(node.value)
            case ast.Import() | ast.ImportFrom() if getattr(node, "module", "") != "__future__":
                bound |= {alias.asname or alias.name for alias in node.names}
            case ast.FunctionDef() | ast.ClassDef():
                pytest.fail(f"{name}.{node.name} is defined in __init__.py: give it a module")
    assert {found for found in bound if not found.startswith("_")} == set(listed)


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for folder in SIZED for path in python_files(folder)]
    lengths = {path: path.read_text().count("\n") for path in files}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def function_lengths() -> dict[str, int]:
    return {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for folder in SIZED
        for path in python_files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_no_function_is_longer_than_60_lines_and_few_are_longer_than_25() -> None:
    lengths = function_lengths()
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    ordered = sorted(lengths.values())
    assert ordered[len(ordered) // 2] <= 8
    assert ordered[len(ordered) * 9 // 10] <= 25


def test_importing_the_front_door_loads_no_heavy_library() -> None:
    heavy = {"torch", "numpy", "django", "flower", "tornado", "prometheus_client", "pytest"}
    # kombu's JSON looks at Django's lazy strings where Django is installed: that is Celery's own.
    code = (
        "import sys; from celery import Celery, Task; before = set(sys.modules); import gw_celery;"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert heavy & {name.split(".")[0] for name in done.stdout.split()} == set()
