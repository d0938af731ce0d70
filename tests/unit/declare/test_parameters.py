from __future__ import annotations

import dataclasses
import enum
import json
from typing import TYPE_CHECKING, Any, Literal, Optional, TypedDict

import pytest

import gw_celery as gw
from gw_celery.declare import parameters
from tests.unit.refusals import NOT_FINITE, refused

if TYPE_CHECKING:
    from nowhere import OnlyForTypeCheckers


class Size(enum.StrEnum):
    SMALL = "small"


class Options(TypedDict, total=False):
    depth: int


class Declared:
    model: str = gw.parameter()
    threshold: float = gw.parameter(default=0.5)
    limit: int = gw.parameter(default=10)
    is_strict: bool = gw.parameter(default=False)
    mode: Literal["fast", "exact"] = gw.parameter(default="fast")
    language: Optional[str] = gw.parameter(default=None)  # noqa: UP045
    budget: int | None = gw.parameter(default=None)
    ratio: float | None = gw.parameter(default=None)
    labels: list[str] = gw.parameter(default=["a"])
    weights: dict[str, float] = gw.parameter(default={})
    pairs: list[list[int] | None] = gw.parameter(default=[])
    options: Options = gw.parameter(default={})
    anything = gw.parameter(default=1, scope="call")


def bind(**given: Any) -> dict[str, Any]:
    return parameters.bind("Declared", parameters.declared(Declared), {"model": "m", **given})


def test_what_the_caller_leaves_out_does_not_travel() -> None:
    assert bind(limit=3) == {"model": "m", "limit": 3}


def test_defaults_complete_what_was_given() -> None:
    known = parameters.declared(Declared)

    assert parameters.complete(known, {"model": "m", "limit": 3})["limit"] == 3
    assert parameters.complete(known, {"model": "m"})["threshold"] == 0.5


def test_a_parameter_without_a_default_is_required() -> None:
    error = refused(parameters.bind, "Declared", parameters.declared(Declared), {"limit": 3})

    assert error.argument == "model"
    assert "Declared needs a value" in error.rule


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    error = refused(bind, treshold=0.7)

    assert (error.argument, error.value) == ("treshold", 0.7)
    assert "Declared has parameters: model, threshold, limit" in error.rule


def test_an_int_becomes_a_float_where_one_is_declared() -> None:
    threshold = bind(threshold=1)["threshold"]

    assert threshold == 1.0
    assert type(threshold) is float


def test_an_int_becomes_a_float_where_one_is_optional() -> None:
    assert type(bind(ratio=1)["ratio"]) is float


@pytest.mark.parametrize("name", ["threshold", "limit", "budget", "ratio"])
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_never_taken_for_a_number(name: str, value: bool) -> None:
    error = refused(bind, **{name: value})

    assert error.argument == name
    assert error.value is value
    assert "must be" in error.rule


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("model", 3, "must be str"),
        ("threshold", "0.7", "must be float"),
        ("limit", 1.0, "must be int"),
        ("is_strict", 1, "must be bool"),
        ("mode", "slow", "'fast', 'exact'"),
        ("language", 3, "Optional[str]"),
        ("budget", 1.5, "int | None"),
        ("labels", "a", "list[str]"),
        ("labels", [1], "list[str]"),
        ("labels", ["a", None], "list[str]"),
        ("weights", {"a": "1"}, "dict[str, float]"),
        ("weights", {"a": True}, "dict[str, float]"),
        ("pairs", [[1, 2], [3.5]], "list[int]"),
        ("options", [], "Options"),
        ("threshold", 10**400, "must be float"),
        ("ratio", 10**400, "float | None"),
        ("weights", {"a": 10**400}, "dict[str, float]"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object, rule: str) -> None:
    error = refused(bind, **{name: value})

    assert (error.argument, error.value) == (name, value)
    assert rule in error.rule


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "exact"), ("language", None), ("language", "de"), ("budget", 3), ("labels", [])],
)
def test_literals_and_optionals_take_what_they_list(name: str, value: object) -> None:
    assert bind(**{name: value})[name] == value


def test_elements_are_taken_as_declared() -> None:
    given = bind(labels=["a", "b"], weights={"a": 1}, pairs=[[1], None], options={"depth": 2})

    assert given["labels"] == ["a", "b"]
    assert given["pairs"] == [[1], None]
    assert given["options"] == {"depth": 2}
    assert [type(one) for one in given["weights"].values()] == [float]


def test_a_default_with_a_wrong_element_is_refused_at_decoration(app: gw.App) -> None:
    class Model:
        sizes: list[int] = gw.parameter(default=["a"])

        @gw.method()
        def predict(self): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("sizes", ["a"])
    assert "must be list[int]" in error.rule


def test_an_int_stays_one_where_both_numbers_are_declared() -> None:
    class Model:
        size: float | int = gw.parameter(default=3)

    assert type(parameters.declared(Model)["size"].default) is int


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_number_that_json_lacks_is_refused(value: float) -> None:
    assert "finite" in refused(bind, threshold=value).rule


@pytest.mark.parametrize("value", [b"x", {1}, object(), (1, 2), [(1,)], {1: "a"}, [float("nan")]])
def test_a_value_that_json_would_change_is_refused(value: object) -> None:
    error = refused(bind, anything=value)

    assert error.argument == "anything"
    assert "travel as JSON" in error.rule


def test_a_value_arrives_as_the_plain_type_that_travels() -> None:
    assert type(bind(model=Size.SMALL)["model"]) is str


def test_the_same_values_have_one_text() -> None:
    text = parameters.canonical(bind(threshold=1, limit=2))

    assert text == parameters.canonical(bind(limit=2, threshold=1.0))
    assert text == '{"limit":2,"model":"m","threshold":1.0}'
    assert json.loads(text) == bind(limit=2, threshold=1)


def test_a_default_that_does_not_fit_is_refused_at_decoration(app: gw.App) -> None:
    class Model:
        threshold: float = gw.parameter(default="high")

        @gw.method()
        def predict(self): ...

    error = refused(app.cls, Model)

    assert (error.argument, error.value) == ("threshold", "high")
    assert "must be float" in error.rule


def test_a_scope_that_does_not_exist_is_refused() -> None:
    error = refused(gw.parameter, 1, scope="replica")

    assert (error.argument, error.value) == ("scope", "replica")
    assert '"load", "call"' in error.rule


def test_an_annotation_that_only_type_checkers_see_hides_no_other() -> None:
    class Model:
        first: OnlyForTypeCheckers = gw.parameter(default=1)
        threshold: float = gw.parameter(default=1)

    declared = parameters.declared(Model)

    assert declared["first"].default == 1
    assert type(declared["threshold"].default) is float


def test_parameters_are_inherited_and_overridden() -> None:
    class Child(Declared):
        limit: int = gw.parameter(default=99)
        threshold = 0.9

    child = parameters.declared(Child)

    assert child["limit"].default == 99
    assert "threshold" not in child
    assert child["mode"].default == "fast"
    assert parameters.declared(Declared)["limit"].default == 10


def test_a_parameter_is_read_only() -> None:
    with pytest.raises(AttributeError, match="'limit' is read-only: pass limit=3 at the call"):
        Declared().limit = 3


def test_a_parameter_of_an_object_that_is_no_instance_of_the_service_says_so() -> None:
    with pytest.raises(gw.UsageError, match=r"'limit' was read .* call it through Declared\(...\)"):
        _ = Declared().limit


def test_a_parameter_of_the_class_is_its_declaration() -> None:
    assert isinstance(Declared.limit, parameters.Parameter)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_dataclass_has_parameters_beside_its_fields(app: gw.App, serve, is_frozen) -> None:
    @app.cls
    @dataclasses.dataclass(frozen=is_frozen)
    class Scaler:
        needed: int = gw.parameter()
        factor: float = gw.parameter(default=0.5)
        seen: list[float] = dataclasses.field(default_factory=list)

        @gw.on_enter()
        def load(self):
            self.seen.append(self.factor)

        @gw.method()
        def scale(self, x):
            return [self.factor * x + self.needed, self.seen]

    serve()
    assert Scaler(needed=1).scale.remote(4) == [3.0, [0.5]]
    assert Scaler(needed=2, factor=3).scale.remote(4) == [14.0, [3.0]]


def test_a_parameter_that_a_decorator_has_taken_away_is_refused(app: gw.App) -> None:
    class Base: ...

    @dataclasses.dataclass(slots=True)
    class Slotted(Base):
        factor: float = gw.parameter(default=0.5)

        @gw.method()
        def scale(self, x): ...

    error = refused(app.cls, Slotted)
    assert error.argument == "factor"
    assert repr(error.value) == "gw.parameter(default=0.5)"
    assert "`slots=True` of its decorator takes it away" in error.rule
