from __future__ import annotations

import copy
import json

import pytest

import gw_celery as gw
from tests.unit.refusals import refused


@pytest.fixture
def classifier(app: gw.App) -> type:
    @app.cls(gpu=gw.Gpu("A100"))
    class Classifier:
        """Tells good from bad."""

        threshold: float = gw.parameter(default=0.5)
        language: str = gw.parameter(default="en")

        def __init__(self) -> None:
            self.made = True

        @gw.on_enter()
        def load(self) -> None:
            self.loaded = True

        @gw.on_exit()
        def unload(self) -> None: ...

        @gw.method()
        def classify(self, text: str) -> str:
            """Classify one text."""
            return f"{text} over {self.threshold}"

        @gw.method(ignore_result=True)
        def note(self, text: str) -> None: ...

        @gw.method()
        def both(self, text: str) -> str:
            return self.classify(text) + self.tail()

        def tail(self) -> str:
            return "!"

    return Classifier


def test_a_handle_is_light_and_shows_its_parameters(classifier) -> None:
    handle = classifier(threshold=1)

    assert not isinstance(handle, classifier)
    assert repr(handle) == "Classifier(threshold=1.0)"
    with pytest.raises(AttributeError):
        _ = handle.made


def test_a_handle_refuses_wrong_parameters_at_once(classifier) -> None:
    assert refused(classifier, threshold="high").argument == "threshold"
    assert "threshold, language" in refused(classifier, treshold=0.7).rule


def test_a_handle_can_be_copied(classifier) -> None:
    copied = copy.deepcopy(classifier(threshold=1))

    assert copied.classify.s("x") == classifier(threshold=1).classify.s("x")


def test_parameters_are_given_by_name(classifier) -> None:
    with pytest.raises(gw.UsageError, match="by name: threshold, language"):
        classifier(0.7)


def test_parameters_travel_as_canonical_json_in_a_header(classifier) -> None:
    signature = classifier(threshold=1, language="de").classify.s("x")

    assert signature.options["headers"] == {"gw_params": '{"language":"de","threshold":1.0}'}
    assert classifier().classify.s("x").options == {}


def test_headers_of_the_callers_travel_beside_the_parameters(classifier) -> None:
    method = classifier(threshold=0.7).classify.options(headers={"tenant": "a"})
    signature = method.signature(("x",), headers={"trace": "b"})

    assert signature.options["headers"] == {
        "gw_params": json.dumps({"threshold": 0.7}, separators=(",", ":")),
        "tenant": "a",
        "trace": "b",
    }


def test_signatures_are_celerys(classifier) -> None:
    method = classifier().classify

    assert method.s("x").args == ("x",)
    assert method.s(text="x").kwargs == {"text": "x"}
    assert not method.s("x").immutable
    assert method.si("x").immutable
    assert method.s("x").task == f"{__name__}.Classifier.classify"


@pytest.mark.parametrize("hook", ["load", "unload"])
def test_calling_a_hook_says_that_the_worker_calls_it(classifier, hook: str) -> None:
    with pytest.raises(gw.UsageError, match=rf"Classifier\.{hook} is a hook: the worker calls it"):
        getattr(classifier(), hook)()


def test_a_method_that_is_not_marked_says_which_are(classifier) -> None:
    with pytest.raises(AttributeError) as caught:
        classifier().tail()
    assert "no method 'tail' marked with @gw.method()" in str(caught.value)
    assert "it has: classify, note, both" in str(caught.value)


CALLS = (
    *("delay", "apply_async", "s", "si", "signature", "remote", "aremote", "spawn", "local"),
    *("options", "map", "starmap", "chunks"),
)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_the_class_says_what_to_write(classifier, call: str) -> None:
    with pytest.raises(gw.UsageError) as caught:
        getattr(classifier.classify, call)("x")
    assert f"Classifier.classify.{call}(...) needs an instance" in str(caught.value)
    assert f"write Classifier().classify.{call}(...)" in str(caught.value)


def test_calling_the_class_directly_says_what_to_write(classifier) -> None:
    for args in ((), (classifier(), "x")):
        with pytest.raises(gw.UsageError, match=r"write Classifier\(\).classify\(...\)"):
            classifier.classify(*args)


def test_a_method_keeps_its_name_and_its_words(classifier) -> None:
    assert classifier.classify.__doc__ == "Classify one text."
    assert classifier.classify.__name__ == "classify"
    assert classifier.__doc__ == "Tells good from bad."
    assert not hasattr(classifier.classify, "anything_else")


@pytest.mark.parametrize("name", ["map", "starmap", "chunks"])
def test_canvas_that_would_bypass_the_loaded_state_is_refused(classifier, name: str) -> None:
    args = (["x"], 1) if name == "chunks" else (["x"],)

    with pytest.raises(gw.UsageError) as caught:
        getattr(classifier(threshold=0.7).classify, name)(*args)
    assert ".chunks() would call the body one by one" in str(caught.value)
    assert "write group(Classifier(...).classify.s(x) for x in xs)" in str(caught.value)


@pytest.mark.parametrize("name", ["_given", "_service", "_tasks", "_options", "_no_method"])
def test_a_method_may_have_any_name(app, name: str) -> None:
    def method(self, x): ...

    method.__name__ = name
    app.cls(made := type("Named", (), {name: gw.method()(method), "p": gw.parameter(default=1)}))

    assert getattr(made(p=2), name).task.name.endswith(f"Named.{name}")
    assert repr(made(p=2)) == "Named(p=2)"


def test_waiting_for_what_ignores_its_result_is_refused(classifier) -> None:
    for call in ("remote", "spawn"):
        with pytest.raises(gw.UsageError, match=r"note ignores its result"):
            getattr(classifier().note, call)("x")


def test_another_method_of_the_instance_is_a_plain_call(classifier, serve) -> None:
    serve()

    assert classifier(threshold=0.7).both.remote("x") == "x over 0.7!"


def test_a_subclass_that_is_no_service_is_an_ordinary_class(classifier) -> None:
    class Ordinary(classifier):
        def __init__(self, name: str) -> None:
            self.name = name

    made = Ordinary("x")
    assert isinstance(made, Ordinary)
    assert (made.name, made.tail()) == ("x", "!")


def test_super_reaches_the_plain_method_of_a_decorated_parent(app, classifier, serve) -> None:
    @app.cls
    class Louder(classifier):
        @gw.method()
        def classify(self, text: str) -> str:
            return super().classify(text).upper()

    serve()
    assert Louder(threshold=0.7).classify.remote("x") == "X OVER 0.7"
    assert Louder().both.remote("x") == "X OVER 0.5!"
    assert classifier(threshold=0.7).classify.remote("x") == "x over 0.7"


def test_a_timeout_that_is_no_duration_is_refused(classifier) -> None:
    assert refused(classifier().classify.options, timeout=0).argument == "timeout"
