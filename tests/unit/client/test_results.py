"""What a caller gets for a record that a result backend has: a value, or an error safe to raise."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import celery.exceptions
import pytest
from celery import states
from celery.utils.serialization import UnpickleableExceptionWrapper

import gw_celery as gw
from gw_celery import errors
from gw_celery.testing import workers

Restored = Callable[..., Exception]


def stored(exc_type: str, *args: object, module: str = "builtins") -> dict[str, object]:
    return {"exc_type": exc_type, "exc_message": args, "exc_module": module}


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """A module of the user's, with errors of its own; of another name each time."""
    made = types.ModuleType(f"users_{uuid4().hex}")
    exec("class Full(Exception): ...\nclass Exit(SystemExit): ...\nX = 3", vars(made))  # noqa: S102
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def declare(app: gw.App, module: str, **options: Any) -> Any:
    """Declare a service in a module of this name."""

    async def body(): ...

    body.__module__ = module
    return app.remote(body, queue="asked", **options)


@pytest.fixture
def asked(app: gw.App) -> Any:
    """A task of a module that is not loaded: it makes no error known."""
    app.celery.conf.gw_poll_interval = 0.001
    return declare(app, "elsewhere")


def write(asked: Any, result: object, traceback: str | None, status: str = states.FAILURE) -> str:
    """Write a record as anything may that reaches the backend; its task id."""
    task_id, backend = uuid4().hex, asked.app.backend
    record = {"status": status, "result": result, "traceback": traceback, "children": []}
    written = backend.encode({**record, "task_id": task_id})
    backend.set(backend.get_key_for_task(task_id), written)
    return task_id


@pytest.fixture
def restored(asked: Any) -> Iterator[Restored]:
    """A function of an error's record and its traceback: what the caller gets."""

    def restored(result: object, traceback: str | None = None) -> Exception:
        task_id = write(asked, result, traceback)
        with pytest.raises(Exception) as caught:
            asked.options(task_id=task_id, timeout=60).remote()
        return caught.value

    yield restored
    workers.close_all()


def test_the_answer_of_a_success_is_its_value(asked: Any) -> None:
    task_id = write(asked, [1, 2], None, states.SUCCESS)
    assert asked.options(task_id=task_id, timeout=60).remote() == [1, 2]
    assert asked.AsyncResult(task_id).get(timeout=60) == [1, 2]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (stored("ValueError", "bad", 3), ValueError("bad", 3)),
        (stored("KeyError", "x", module=""), KeyError("x")),
        (
            stored("SoftTimeLimitExceeded", 3, module="billiard.exceptions"),
            celery.exceptions.SoftTimeLimitExceeded(3),
        ),
        (
            stored("NotServedError", "elsewhere", module="gw_celery.errors"),
            errors.NotServedError("elsewhere"),
        ),
    ],
)
def test_a_known_error_comes_back_as_its_class_with_its_arguments(
    restored: Restored, mapping, expected
) -> None:
    error = restored(mapping, "Traceback: here")

    assert type(error) is type(expected)
    assert error.args == expected.args
    assert isinstance(error.__cause__, gw.RemoteTraceback)
    assert "Traceback: here" in str(error.__cause__)


def test_an_error_of_a_module_that_declares_services_is_known(
    app: gw.App, module: types.ModuleType, restored: Restored
) -> None:
    mapping = stored("Full", "queue", module=module.__name__)
    assert type(restored(mapping)) is errors.RemoteTaskError

    declare(app, module.__name__)
    assert type(restored(mapping)) is module.Full


class Exit(SystemExit):
    """What a body may throw, and no caller gets."""


@pytest.mark.parametrize("option", ["throws", "autoretry_for", "dont_autoretry_for"])
def test_an_error_that_task_options_name_is_known(
    app: gw.App, restored: Restored, option: str
) -> None:
    class Mine(Exception): ...

    Mine.__qualname__ = f"Mine_{option}"
    mapping = stored(Mine.__qualname__, "x", module=__name__)
    assert type(restored(mapping)) is errors.RemoteTaskError

    declare(app, "elsewhere.too", **{option: (Mine,)})
    assert type(restored(mapping)) is Mine


@pytest.mark.parametrize("option", ["throws", "autoretry_for", "dont_autoretry_for"])
def test_an_exit_that_task_options_name_is_never_raised(
    app: gw.App, asked: Any, restored: Restored, option: str
) -> None:
    declare(app, "elsewhere.too", **{option: (Exit, SystemExit)})

    for mapping in (stored("SystemExit", 3), stored("Exit", 3, module=__name__)):
        assert type(restored(mapping)) is errors.RemoteTaskError
        with pytest.raises(errors.RemoteTaskError):
            asked.AsyncResult(write(asked, mapping, None)).get(timeout=60)


CUSTOM = """
class Coded(Exception):
    def __init__(self, message, code=500):
        super().__init__(f"E{code}: {message}")
class Shown(Exception):
    def __init__(self, message, code=500):
        super().__init__(message)
        self.code = code
    def __str__(self):
        return f"{self.code}: {self.args[0]}"
class Silent(Exception):
    def __str__(self):
        return self.args[0].text
class Plain(Exception): ...
class Text(str): ...
"""


@pytest.mark.parametrize(
    ("mapping", "traceback", "message"),
    [
        (stored("Coded", "E404: nope"), None, "E404: nope"),
        (stored("Shown", "nope"), "Traceback:\nusers.Shown: 404: nope\n", "nope"),
        (stored("Silent", "nope"), None, "nope"),
    ],
)
def test_an_error_that_its_class_would_make_another_one_of_keeps_its_text(
    app: gw.App, module: types.ModuleType, restored: Restored, mapping, traceback, message
) -> None:
    exec(CUSTOM, vars(module))  # noqa: S102
    declare(app, module.__name__)

    error = restored({**mapping, "exc_module": module.__name__}, traceback)
    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == f"{module.__name__}.{mapping['exc_type']}"
    assert error.message == message


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        (stored("Shown", "nope"), "users.Shown: 500: nope\nand a note"),
        (stored("Coded"), None),
        # What does not travel is sent as its repr: the class is worth more than the text.
        (stored("Plain", "ValueError('x')"), "users.Plain: x"),
    ],
)
def test_an_error_that_can_be_made_again_keeps_its_class(
    app: gw.App, module: types.ModuleType, restored: Restored, mapping, line
) -> None:
    exec(CUSTOM.replace("message, code", "message='', code"), vars(module))  # noqa: S102
    declare(app, module.__name__)
    if mapping["exc_type"] == "Coded":
        mapping = {**mapping, "exc_message": ()}
        vars(module)["Coded"].__init__ = lambda self: None

    error = restored({**mapping, "exc_module": module.__name__}, line and f"Traceback:\n{line}\n")
    assert type(error) is vars(module)[mapping["exc_type"]]
    assert error.args == mapping["exc_message"]


def test_a_built_in_error_keeps_its_class_though_a_part_of_its_text_does_not_travel(
    restored: Restored,
) -> None:
    traceback = "Traceback:\nFileNotFoundError: [Errno 2] No such file: 'weights'\n"

    error = restored(stored("FileNotFoundError", 2, "No such file"), traceback)
    assert type(error) is FileNotFoundError


def test_an_unknown_class_is_a_remote_task_error(restored: Restored) -> None:
    error = restored(stored("Gone", "no model", 3, module="lost.module"), "Traceback")

    assert isinstance(error, gw.RemoteTaskError)
    assert (error.type_name, error.message) == ("lost.module.Gone", "no model, 3")
    assert error.traceback == "Traceback"
    assert str(error) == "lost.module.Gone: no model, 3"
    assert isinstance(error.__cause__, gw.RemoteTraceback)


def test_no_module_is_imported_for_an_error(restored: Restored) -> None:
    restored(stored("Antigravity", module="antigravity"))

    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_what_ends_a_process_is_never_raised(restored: Restored, name: str) -> None:
    for mapping in (stored(name, 3), stored(name, 3, module="")):
        error = restored(mapping)
        assert type(error) is errors.RemoteTaskError
        assert error.type_name.endswith(name)


@pytest.mark.parametrize("name", ["WorkerShutdown", "WorkerTerminate"])
def test_what_ends_a_worker_is_never_raised(restored: Restored, name: str) -> None:
    error = restored(stored(name, 3, module="celery.exceptions"))

    assert type(error) is errors.RemoteTaskError


def test_an_exit_that_a_users_module_defines_is_never_raised(
    app: gw.App, module: types.ModuleType, restored: Restored
) -> None:
    declare(app, module.__name__)

    error = restored(stored("Exit", 3, module=module.__name__))
    assert type(error) is errors.RemoteTaskError


@pytest.mark.parametrize("name", ["print", "int", "exec", "X", "__name__", "Full.__init__"])
def test_what_is_no_error_is_never_called(
    app: gw.App, module: types.ModuleType, restored: Restored, name: str, capsys
) -> None:
    declare(app, module.__name__)
    for place in ("builtins", module.__name__):
        error = restored(stored(name, "1", module=place))
        assert type(error) is errors.RemoteTaskError
    assert capsys.readouterr().out == ""


def test_a_known_error_comes_back_from_celerys_own_result_with_the_remote_traceback(
    asked: Any,
) -> None:
    with pytest.raises(ValueError, match="x") as caught:
        asked.AsyncResult(write(asked, stored("ValueError", "x"), "tb")).get(timeout=60)
    assert isinstance(caught.value.__cause__, gw.RemoteTraceback)


def test_a_class_that_celery_made_up_is_a_remote_task_error(asked: Any) -> None:
    """Where a result is read by Celery, which makes a class for a name that it does not find."""
    record = {**stored("Gone", "x"), "exc_module": None}

    with pytest.raises(errors.RemoteTaskError) as caught:
        asked.AsyncResult(write(asked, record, None)).get(timeout=60)
    assert caught.value.type_name.endswith(".Gone")
    assert caught.value.message == "x"


def test_celerys_stand_in_names_the_class_that_it_stands_for(
    asked: Any, restored: Restored
) -> None:
    stand_in = UnpickleableExceptionWrapper("lost.module", "Gone", ["x"], "Gone('x')")
    mapping = stored(
        "UnpickleableExceptionWrapper", *stand_in.args, module="celery.utils.serialization"
    )

    with pytest.raises(errors.RemoteTaskError) as caught:
        asked.AsyncResult(write(asked, mapping, None)).get(timeout=60)
    for error in (caught.value, restored(mapping)):
        assert isinstance(error, gw.RemoteTaskError)
        assert (error.type_name, error.message) == ("lost.module.Gone", "x")


def test_a_class_that_wants_other_arguments_is_a_remote_task_error(restored: Restored) -> None:
    error = restored(stored("UnicodeDecodeError", "only one"))

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "builtins.UnicodeDecodeError"
    assert error.message == "only one"


def test_a_message_that_is_no_list_is_one_argument(restored: Restored) -> None:
    mapping = {"exc_type": "ValueError", "exc_message": "bad", "exc_module": "builtins"}

    assert restored(mapping).args == ("bad",)


@pytest.mark.parametrize("broken", [None, "gone", 3, [], {}, {"exc_message": "x"}])
def test_a_record_that_describes_no_error_is_a_remote_task_error(
    restored: Restored, broken: object
) -> None:
    error = restored(broken)

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "unknown error"


@pytest.mark.parametrize("module", [1, None])
def test_a_stand_in_with_broken_arguments_is_a_remote_task_error(
    restored: Restored, module: object
) -> None:
    mapping = stored("UnpickleableExceptionWrapper", module, 2, 3, 4, module="x")

    assert isinstance(restored(mapping), gw.RemoteTaskError)


def test_what_a_terminal_would_obey_is_taken_out(restored: Restored) -> None:
    error = restored(
        stored("G\x1b[2Jone", "\x1b]0;owned\x07bad\r\nnews\x9b", module="lost"), "a\x1b[31m\tb\nc"
    )

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "lost.G[2Jone"
    assert error.message == "]0;ownedbad\nnews"
    assert error.traceback == "a[31m\tb\nc"
    assert "\x1b" not in str(error.__cause__)


def test_long_texts_are_cut_and_a_traceback_keeps_its_end(restored: Restored) -> None:
    error = restored(stored("Gone", "m" * 100_000, module="lost"), "t" * 100_000 + " the end")

    assert isinstance(error, gw.RemoteTaskError)
    assert len(error.message) == 20_000
    assert len(error.traceback) == 20_000
    assert error.traceback.endswith(" the end")


def test_a_registered_error_is_known(restored: Restored) -> None:
    gw.register_type(Registered)

    error = restored(stored("Registered", 3, module=__name__))
    assert type(error) is Registered


class Registered(Exception): ...
