from __future__ import annotations

import itertools
import linecache
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import gw_celery as gw
from gw_celery.declare import registry
from gw_celery.replica import fingerprint
from tests.processes import environment

FUNCTION = """
@app.remote({arguments})
@gw.concurrent(max_inputs={max_inputs})
async def embed(x: int = {default}) -> int:
    {body}
"""
CLASS = """
class Base:
    def help(self):
        return {helped}

class Weights:
    size = {size}

    async def __aenter__(self):
        return self.size

    async def __aexit__(self, *exc):
        pass

app.context({context})(Weights)

@app.cls()
class Model(Base):
    threshold: float = gw.parameter(default={parameter})

    @gw.on_enter()
    def load(self):
        self.loaded = {loaded}

    @gw.method(benchmark_dataset={dataset})
    @gw.batched(max_batch_size={size_of_batch})
    def embed(self, xs):
        return {answer}
"""
_names = itertools.count()


def declared(source: str, *, has_source: bool = True) -> gw.App:
    """An App of a module with this text, as it would be imported."""
    app, name = gw.App("unit"), f"<unit {next(_names)}>"
    if has_source:
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"app": app, "gw": gw, "__name__": "unit"}
    exec(compile(source, name, "exec"), scope)  # noqa: S102 - as an import does
    return app


def of(app: gw.App, *devices: str) -> str:
    (service,) = app.registry.services.values()
    (method,) = service.methods.values()
    return fingerprint.of(service, method, tuple(app.registry.contexts.values()), devices)


def function(*, has_source: bool = True, **changes: Any) -> gw.App:
    given = {
        "arguments": "benchmark_dataset=[{'x': 1}]",
        "max_inputs": 4,
        "default": 1,
        "body": "return x",
    }
    return declared(FUNCTION.format(**{**given, **changes}), has_source=has_source)


def a_class(**changes: Any) -> gw.App:
    given = {
        "helped": 1,
        "size": 1,
        "context": "",
        "parameter": 0.5,
        "loaded": 1,
        "dataset": "[{'xs': 1}]",
        "size_of_batch": 4,
        "answer": "xs",
    }
    return declared(CLASS.format(**{**given, **changes}))


def test_the_same_declaration_has_the_same_fingerprint() -> None:
    assert of(function()) == of(function())
    assert of(function(has_source=False)) == of(function(has_source=False))


@pytest.mark.parametrize("has_source", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"body": "return x + 1"},
        {"body": "return [x for y in [7]][0]"},
        {"default": 2, "body": "return x + x"},
        {"max_inputs": 5},
        {"arguments": "benchmark_dataset=[{'x': 2}]"},
        {"arguments": "benchmark_dataset=[{'x': 1}], benchmark_runs=3"},
        {"arguments": "benchmark_dataset=[{'x': 1}], benchmark_concurrency=3"},
        {"arguments": "benchmark_generator=lambda: {'x': 1}"},
        {"arguments": "benchmark_generator=lambda: {'x': 2}"},
        {"arguments": "benchmark_dataset=[{'x': 1}], workload_calculator=lambda x: 3.0"},
        {"arguments": "benchmark_dataset=[{'x': 1}], workload_calculator=lambda x: 4.0"},
    ],
    ids=str,
)
def test_a_changed_function_has_another(change: dict[str, Any], *, has_source: bool) -> None:
    assert of(function(has_source=has_source, **change)) != of(function(has_source=has_source))


def test_two_generators_that_differ_have_different_ones() -> None:
    made = [
        of(function(arguments=f"benchmark_generator=lambda: {{'x': {x}}}", has_source=False))
        for x in (1, 2)
    ]
    assert made[0] != made[1]


def test_the_same_class_has_the_same() -> None:
    assert of(a_class()) == of(a_class())


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "[x * 2 for x in xs]"},
        {"loaded": 2},
        {"helped": 2},
        {"parameter": 0.6},
        {"size_of_batch": 8},
        {"size": 2},
        {"dataset": "[{'xs': (1, 2)}]"},
    ],
    ids=str,
)
def test_a_changed_hook_base_parameter_batch_or_context_has_another(change: dict[str, Any]) -> None:
    assert of(a_class(**change)) != of(a_class())


def test_other_hardware_has_another() -> None:
    app = function()
    one = of(app, "NVIDIA A100", "NVIDIA A100")
    assert len({one, of(app), of(app, "NVIDIA A100"), of(app, "NVIDIA L4", "NVIDIA L4")}) == 4
    assert of(app, "a", "b") == of(app, "b", "a")


@pytest.mark.parametrize("library", ["gw-celery", "torch"])
def test_another_version_of_a_library_has_another(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before, known = of(function()), fingerprint._installed
    monkeypatch.setattr(
        fingerprint, "_installed", lambda name: "9.9" if name == library else known(name)
    )
    assert of(function()) != before


def test_another_python_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(function())
    # The code is the same: that Python compiles it to something else is not what is asked here.
    monkeypatch.setattr(platform, "python_version", lambda: "9.9.9")
    assert of(function()) != before


def test_torch_is_not_imported_for_it() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from tests.unit.replica import test_fingerprint as t\n"
        "t.of(t.function()); print('torch' in sys.modules)"
    )
    done = _run(code)
    assert done == "False"


def test_it_is_the_same_in_every_process() -> None:
    # Sets of strings have another order in each.
    code = (
        "from tests.unit.replica import test_fingerprint as t\n"
        "dataset = \"benchmark_dataset=[{'x': {'a', 'b', 'c', 'd'}}]\"\n"
        "body = \"return x in {'p', 'q', 'r', 's'}\"\n"
        "print(t.of(t.function(arguments=dataset, body=body)))"
    )
    assert len({_run(code) for _ in range(3)}) == 1


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    return done.stdout.strip()


class Odd:
    """No JSON, and no pickle."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


@pytest.mark.parametrize(
    "value",
    [b"bytes", {1, 2}, {1: 2}, {(1, 2): 3}, Odd(), object, len, lambda: 1, 1j],
    ids=lambda one: type(one).__name__,
)
def test_any_sample_has_a_fingerprint(app: gw.App, value: Any) -> None:
    async def embed(x: Any) -> None: ...

    app.remote(benchmark_dataset=[{"x": value}])(embed)
    assert of(app) == of(app)


def test_a_context_is_told_by_its_arguments(app: gw.App) -> None:
    made: Callable[[int], registry.Context] = lambda size: registry.Context(  # noqa: E731
        cls=Odd, args=(size,), kwargs={}
    )

    async def embed(x: int) -> None: ...

    app.remote(benchmark_dataset=[{"x": 1}])(embed)
    (service,) = app.registry.services.values()
    (method,) = service.methods.values()
    assert len({fingerprint.of(service, method, [made(size)]) for size in (1, 2)}) == 2
