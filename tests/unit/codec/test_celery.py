"""What Celery itself puts through a serializer: bodies with canvases, and results with errors."""

from __future__ import annotations

import json

import celery
import pytest
from celery import _state, canvas
from kombu import serialization
from kombu.utils import json as kombu_json

from gw_celery import codec
from tests.unit.codec.sameness import same

app = celery.Celery(
    "codec-tests", broker="memory://", backend="cache+memory://", set_as_current=False
)
app.conf.update(
    task_serializer=codec.NAME,
    result_serializer=codec.NAME,
    accept_content=[codec.NAME],
    result_extended=True,
)


@app.task(name="codec.add")
def add(*numbers):
    return sum(numbers)


@app.task(name="codec.gather")
def gather(numbers):
    return numbers


class Strange(Exception):
    pass


@pytest.fixture(autouse=True)
def _registered():
    codec.register()


@pytest.fixture(autouse=True)
def _current():
    """The parts of a restored canvas look their tasks up in the current app."""
    before = _state._tls.current_app
    app.set_current()
    yield
    _state._tls.current_app = before


def through_the_wire(value):
    content_type, encoding, text = serialization.dumps(value, serializer=codec.NAME)
    return serialization.loads(text.encode(), content_type, encoding, accept=[codec.CONTENT_TYPE])


CANVASES = {
    "signature": lambda: gather.s((1, 2)),
    "immutable": lambda: add.si(1).set(queue="gpu", countdown=3),
    "chain": lambda: add.s(1, 2) | add.s(3) | add.s(4),
    "group": lambda: canvas.group(add.s(1), add.s(2)),
    "group of a generator": lambda: canvas.group(add.s(n) for n in range(3)),
    "chord": lambda: canvas.chord([add.s(1), add.s(2)], gather.s()),
    "chord in a chain": lambda: add.s(1) | canvas.group(add.s(2), add.s(3)) | gather.s(),
    "group in a group": lambda: canvas.group(canvas.group(add.s(1)), add.s(2)),
    "map": lambda: add.map([1, 2]),
    "chunks": lambda: add.chunks([(1, 2), (3, 4)], 2),
}


def plain(value):
    """The value without Celery's own classes: what a receiver may see of it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", CANVASES)
def test_a_canvas_arrives_as_dicts_with_all_that_it_holds(name):
    assert same(through_the_wire(CANVASES[name]()), plain(CANVASES[name]()))


@pytest.mark.parametrize("name", CANVASES)
def test_celery_restores_a_canvas_to_the_same_class_as_after_its_own_json(name):
    stock = kombu_json.loads(kombu_json.dumps(CANVASES[name]()))
    restored = canvas.maybe_signature(through_the_wire(CANVASES[name]()), app=app)
    assert type(restored) is type(canvas.maybe_signature(stock, app=app))


@pytest.mark.parametrize("name", [name for name in CANVASES if name != "chunks"])
def test_a_canvas_that_arrived_runs_as_the_one_that_was_sent(name, monkeypatch):
    monkeypatch.setitem(app.conf, "task_always_eager", True)
    restored = canvas.maybe_signature(through_the_wire(CANVASES[name]()), app=app)
    assert restored.apply().get() == CANVASES[name]().apply().get()


@pytest.mark.parametrize("name", CANVASES)
def test_a_message_carries_canvases_as_arguments_and_as_callbacks(name):
    sent = CANVASES[name]
    body = app.amqp.as_task_v2(
        "some-id", "codec.add", args=(sent(),), kwargs={"then": sent()},
        callbacks=[sent()], errbacks=[add.s()], chain=[sent(), add.s()], chord=sent(),
    ).body  # fmt: skip
    assert same(through_the_wire(body), plain(body))


def test_a_plain_body_without_tuples_is_the_json_of_the_task_protocol():
    body = [["hello world"], {"k": 1}, {"callbacks": None, "chain": None}]
    _, _, text = serialization.dumps(body, serializer=codec.NAME)
    assert json.loads(text) == body


def test_a_result_is_stored_and_comes_back_with_its_types():
    app.backend.store_result("r1", {"points": [(1, 2)], 3: {4}}, "SUCCESS")
    assert app.backend.get_result("r1") == {"points": [(1, 2)], 3: {4}}
    assert app.AsyncResult("r1").date_done is not None


def test_an_error_is_stored_with_arguments_that_the_serializer_knows():
    app.backend.store_result("r2", Strange("no", (1, 2)), "FAILURE", traceback="Traceback ...")
    error = app.backend.get_result("r2")
    assert (type(error), error.args) == (Strange, ("no", (1, 2)))
    assert app.AsyncResult("r2").traceback == "Traceback ..."


def test_an_error_with_an_argument_that_it_does_not_know_is_stored_all_the_same():
    app.backend.store_result("r3", Strange(object()), "FAILURE")
    assert "object object at" in str(app.backend.get_result("r3"))


def test_the_results_of_a_group_come_back_as_a_tree():
    group = app.GroupResult("g", [app.AsyncResult("a"), app.AsyncResult("b")])
    back = celery.result.result_from_tuple(through_the_wire(group.as_tuple()), app=app)
    assert back == group
