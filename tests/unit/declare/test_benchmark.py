from __future__ import annotations

import random

import pytest

import gw_celery as gw
from gw_celery.declare import markers
from tests.unit.refusals import NOT_FINITE, NOT_NUMBERS, refused


def sample() -> dict[str, int]:
    return {"x": random.randint(1, 9)}


def test_without_a_source_there_is_no_benchmark() -> None:
    assert markers.benchmark(None, None, 10, 10) is None


def test_a_dataset_is_kept_as_it_was_declared() -> None:
    rows = [{"x": 2}, {"x": -5}]
    declared = markers.benchmark(rows, None, 10, 10)
    rows[0]["x"] = 99

    assert declared == markers.Benchmark(dataset=({"x": 2}, {"x": -5}))


def test_a_generator_is_not_called_when_it_is_declared() -> None:
    def generate() -> dict[str, int]:
        raise AssertionError("called in the process of a client")

    declared = markers.benchmark(None, generate, 20, 5)

    assert declared == markers.Benchmark(generator=generate, runs=20, concurrency=5)


def test_two_sources_are_refused(app: gw.App) -> None:
    error = refused(app.remote, benchmark_dataset=[{"x": 2}], benchmark_generator=sample)

    assert (error.argument, error.value) == ("benchmark_generator", sample)
    assert "benchmark_dataset or this, not both" in error.rule


@pytest.mark.parametrize("dataset", [[], ()])
def test_an_empty_dataset_is_refused(app: gw.App, dataset: object) -> None:
    error = refused(app.remote, benchmark_dataset=dataset)

    assert (error.argument, error.value) == ("benchmark_dataset", dataset)
    assert "must not be empty" in error.rule


@pytest.mark.parametrize("dataset", [{"x": 2}, "x=2", b"x", 3, {1}])
def test_a_dataset_that_is_no_list_is_refused(dataset: object) -> None:
    error = refused(markers.benchmark, dataset, None, 10, 10)

    assert (error.argument, error.value) == ("benchmark_dataset", dataset)
    assert "list of dicts" in error.rule


@pytest.mark.parametrize("row", [1, [("x", 1)], {1: 2}, None])
def test_a_sample_that_is_no_dict_of_names_is_refused(row: object) -> None:
    error = refused(markers.benchmark, [{"x": 1}, row], None, 10, 10)

    assert (error.argument, error.value) == ("benchmark_dataset", row)
    assert "dict of parameter names" in error.rule


@pytest.mark.parametrize("row", [{"y": 2}, {}, {"x": 2, "y": 3}])
def test_dataset_keys_that_do_not_match_the_signature_are_refused(
    app: gw.App, row: dict[str, int]
) -> None:
    async def square(x):
        return x * x

    error = refused(app.remote(benchmark_dataset=[{"x": 1}, row]), square)

    assert (error.argument, error.value) == ("benchmark_dataset[1]", row)
    assert "must match the parameters (x)" in error.rule


def test_dataset_keys_of_a_method_are_matched_without_self(app: gw.App) -> None:
    class Embedder:
        @gw.method(benchmark_dataset=[{"self": 1}])
        def embed(self, texts): ...

    class Ranker:
        @gw.method(benchmark_dataset=[{"texts": []}])
        def rank(self, texts, limit=3): ...

    assert refused(app.cls, Embedder).argument == "benchmark_dataset[0]"
    assert app.cls(Ranker) is Ranker


def test_dataset_keys_of_a_bound_function_are_matched_without_the_task(app: gw.App) -> None:
    @app.remote(bind=True, benchmark_dataset=[{"x": 1}])
    async def square(self, x): ...

    error = refused(app.remote(bind=True, benchmark_dataset=[{"self": 1, "x": 1}]), square_of)
    assert "must match the parameters (x)" in error.rule


async def square_of(self, x): ...


@pytest.mark.parametrize("decorate", ["remote", "method"])
@pytest.mark.parametrize("argument", ["benchmark_runs", "benchmark_concurrency"])
@pytest.mark.parametrize("value", [0, -1, 10_001, 1.5, *NOT_FINITE, *NOT_NUMBERS])
def test_a_number_of_runs_out_of_range_is_refused(
    app: gw.App, decorate: str, argument: str, value: object
) -> None:
    error = refused({"remote": app.remote, "method": gw.method}[decorate], **{argument: value})

    assert error.argument == argument
    assert error.value is value
    assert "1 to 10000" in error.rule


@pytest.mark.parametrize("argument", ["benchmark_generator", "workload_calculator"])
@pytest.mark.parametrize("value", [1, "sample", {"x": 1}])
def test_what_cannot_be_called_is_refused(app: gw.App, argument: str, value: object) -> None:
    for decorate in (app.remote, gw.method):
        error = refused(decorate, **{argument: value})

        assert (error.argument, error.value) == (argument, value)
        assert "must be a function" in error.rule


def test_a_benchmark_needs_defaults_for_all_parameters(app: gw.App) -> None:
    class Model:
        size: int = gw.parameter(default=1)
        name: str = gw.parameter()

        @gw.method(benchmark_dataset=[{"x": 1}])
        def predict(self, x: int) -> None: ...

    error = refused(app.cls(), Model)

    assert error.argument == "name"
    assert "for the benchmark of Model.predict gives no value" in error.rule
