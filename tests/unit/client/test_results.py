from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import celery.exceptions
import pytest
from celery import states
from celery.utils.serialization import UnpickleableExceptionWrapper

import gw_celery as gw
from gw_celery import errors, signals
from gw_celery.client import results


class Unheard(Exception):
    """Of a module that declares no service, until a test says so."""


def stored(exc_type: str, *args: object, module: str = "builtins") -> dict[str, object]:
    return {"exc_type": exc_type, "exc_message": args, "exc_module": module}


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """A module of the user's, with errors of its own."""
    made = types.ModuleType("users_tasks")
    exec("class Full(Exception): ...\nclass Exit(SystemExit): ...\nX = 3", vars(made))  # noqa: S102
    sys.modules["users_tasks"] = made
    yield made
    del sys.modules["users_tasks"]


@pytest.fixture(autouse=True)
def _what_is_declared_stays_in_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_registries", [])


def declare(app: gw.App, **options: Any) -> None:
    """Declare a service in the user's module."""

    async def body(): ...

    body.__module__ = "users_tasks"
    app.remote(body, **options)


def raised(meta: dict[str, object]) -> Exception:
    with pytest.raises(Exception) as caught:
        results.value_of(meta)
    return caught.value


def test_the_answer_of_a_success_is_its_value() -> None:
    assert results.value_of({"status": states.SUCCESS, "result": [1, 2]}) == [1, 2]


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
def test_a_known_error_comes_back_as_its_class_with_its_arguments(mapping, expected) -> None:
    error = raised({"status": states.FAILURE, "result": mapping, "traceback": "Traceback: here"})

    assert type(error) is type(expected)
    assert error.args == expected.args
    assert isinstance(error.__cause__, gw.RemoteTraceback)
    assert "Traceback: here" in str(error.__cause__)


def test_an_error_of_a_module_that_declares_services_is_known(app, module) -> None:
    mapping = stored("Full", "queue", module="users_tasks")
    assert type(results.restored(mapping, None)) is errors.RemoteTaskError

    declare(app)
    assert type(results.restored(mapping, None)) is module.Full


def test_an_error_that_task_options_name_is_known(app: gw.App) -> None:
    mapping = stored("Unheard", "x", module=__name__)
    assert type(results.restored(mapping, None)) is errors.RemoteTaskError

    declare(app, throws=(Unheard,))
    assert type(results.restored(mapping, None)) is Unheard


class Exit(SystemExit):
    """What a body may throw, and no caller gets."""


@pytest.mark.parametrize("option", ["throws", "autoretry_for", "dont_autoretry_for"])
def test_an_exit_that_task_options_name_is_never_raised(app: gw.App, option: str) -> None:
    @app.remote(**{option: (Exit, SystemExit)})
    async def body(): ...

    for mapping in (stored("SystemExit", 3), stored("Exit", 3, module=__name__)):
        assert type(results.restored(mapping, None)) is errors.RemoteTaskError
    assert type(results.restored(Exit(3), None)) is errors.RemoteTaskError


def test_declaring_makes_the_errors_of_the_options_known(app: gw.App) -> None:
    class Mine(Exception): ...

    @app.remote(autoretry_for=(Mine,))
    async def body(): ...

    name = f"{__name__}.{Mine.__qualname__}"
    assert results._class(name) is Mine


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
        (stored("Shown", "nope"), "Traceback:\nusers_tasks.Shown: 404: nope\n", "nope"),
        (stored("Silent", "nope"), None, "nope"),
    ],
)
def test_an_error_that_its_class_would_make_another_one_of_keeps_its_text(
    app, module, mapping, traceback, message
) -> None:
    exec(CUSTOM, vars(module))  # noqa: S102
    declare(app)

    error = results.restored({**mapping, "exc_module": "users_tasks"}, traceback)
    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == f"users_tasks.{mapping['exc_type']}"
    assert error.message == message


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        (stored("Shown", "nope"), "users_tasks.Shown: 500: nope\nand a note"),
        (stored("Coded"), None),
        # What does not travel is sent as its repr: the class is worth more than the text.
        (stored("Plain", "ValueError('x')"), "users_tasks.Plain: x"),
    ],
)
def test_an_error_that_can_be_made_again_keeps_its_class(app, module, mapping, line) -> None:
    exec(CUSTOM.replace("message, code", "message='', code"), vars(module))  # noqa: S102
    declare(app)
    if mapping["exc_type"] == "Coded":
        mapping = {**mapping, "exc_message": ()}
        vars(module)["Coded"].__init__ = lambda self: None

    error = results.restored(
        {**mapping, "exc_module": "users_tasks"}, line and f"Traceback:\n{line}\n"
    )
    assert type(error).__name__ == mapping["exc_type"]
    assert type(error).__module__ == "users_tasks"
    assert error.args == mapping["exc_message"]


def test_a_built_in_error_keeps_its_class_though_a_part_of_its_text_does_not_travel() -> None:
    traceback = "Traceback:\nFileNotFoundError: [Errno 2] No such file: 'weights'\n"

    error = results.restored(stored("FileNotFoundError", 2, "No such file"), traceback)
    assert type(error) is FileNotFoundError


def test_an_unknown_class_is_a_remote_task_error() -> None:
    error = results.restored(stored("Gone", "no model", 3, module="lost.module"), "Traceback")

    assert isinstance(error, gw.RemoteTaskError)
    assert (error.type_name, error.message) == ("lost.module.Gone", "no model, 3")
    assert error.traceback == "Traceback"
    assert str(error) == "lost.module.Gone: no model, 3"
    assert isinstance(error.__cause__, gw.RemoteTraceback)


def test_no_module_is_imported_for_an_error() -> None:
    results.restored(stored("Antigravity", module="antigravity"), None)

    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_what_ends_a_process_is_never_raised(name: str) -> None:
    for mapping in (stored(name, 3), stored(name, 3, module="")):
        error = results.restored(mapping, None)
        assert type(error) is errors.RemoteTaskError
        assert error.type_name.endswith(name)


@pytest.mark.parametrize("name", ["WorkerShutdown", "WorkerTerminate"])
def test_what_ends_a_worker_is_never_raised(name: str) -> None:
    error = results.restored(stored(name, 3, module="celery.exceptions"), None)

    assert type(error) is errors.RemoteTaskError


def test_an_exit_that_a_users_module_defines_is_never_raised(app, module) -> None:
    declare(app)

    error = results.restored(stored("Exit", 3, module="users_tasks"), None)
    assert type(error) is errors.RemoteTaskError


@pytest.mark.parametrize("name", ["print", "int", "exec", "X", "__name__", "Full.__init__"])
def test_what_is_no_error_is_never_called(app, module, name: str, capsys) -> None:
    declare(app)
    for place in ("builtins", "users_tasks"):
        error = results.restored(stored(name, "1", module=place), None)
        assert type(error) is errors.RemoteTaskError
    assert capsys.readouterr().out == ""


def test_an_exit_that_celery_restored_is_never_raised() -> None:
    meta = {"status": states.FAILURE, "result": SystemExit(3), "traceback": None}

    assert type(raised(meta)) is errors.RemoteTaskError


def test_a_known_error_that_celery_restored_keeps_its_identity() -> None:
    error = ValueError("x")

    assert raised({"status": states.FAILURE, "result": error, "traceback": "tb"}) is error
    assert isinstance(error.__cause__, gw.RemoteTraceback)


def test_a_class_that_celery_made_up_is_a_remote_task_error() -> None:
    made_up = type("Gone", (Exception,), {"__module__": "lost.module"})
    error = results.restored(made_up("x"), None)

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "lost.module.Gone"


def test_celerys_stand_in_names_the_class_that_it_stands_for() -> None:
    stand_in = UnpickleableExceptionWrapper("lost.module", "Gone", ["x"], "Gone('x')")
    mapping = stored(
        "UnpickleableExceptionWrapper",
        *stand_in.args,
        module="celery.utils.serialization",
    )

    for error in (results.restored(stand_in, None), results.restored(mapping, None)):
        assert isinstance(error, gw.RemoteTaskError)
        assert (error.type_name, error.message) == ("lost.module.Gone", "x")


def test_a_class_that_wants_other_arguments_is_a_remote_task_error() -> None:
    error = results.restored(stored("UnicodeDecodeError", "only one"), None)

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "builtins.UnicodeDecodeError"
    assert error.message == "only one"


def test_a_message_that_is_no_list_is_one_argument() -> None:
    mapping = {"exc_type": "ValueError", "exc_message": "bad", "exc_module": "builtins"}

    assert results.restored(mapping, None).args == ("bad",)


@pytest.mark.parametrize("broken", [None, "gone", 3, [], {}, {"exc_message": "x"}])
def test_a_record_that_describes_no_error_is_a_remote_task_error(broken: object) -> None:
    error = raised({"status": states.FAILURE, "result": broken, "traceback": None})

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "unknown error"


def test_a_stand_in_with_broken_arguments_is_a_remote_task_error() -> None:
    mapping = stored("UnpickleableExceptionWrapper", 1, 2, 3, 4, module="x")

    assert isinstance(results.restored(mapping, None), gw.RemoteTaskError)


def test_what_a_terminal_would_obey_is_taken_out() -> None:
    error = results.restored(
        stored("G\x1b[2Jone", "\x1b]0;owned\x07bad\r\nnews\x9b", module="lost"), "a\x1b[31m\tb\nc"
    )

    assert isinstance(error, gw.RemoteTaskError)
    assert error.type_name == "lost.G[2Jone"
    assert error.message == "]0;ownedbad\nnews"
    assert error.traceback == "a[31m\tb\nc"
    assert "\x1b" not in str(error.__cause__)


def test_long_texts_are_cut_and_a_traceback_keeps_its_end() -> None:
    error = results.restored(
        stored("Gone", "m" * 100_000, module="lost"), "t" * 100_000 + " the end"
    )

    assert isinstance(error, gw.RemoteTaskError)
    assert len(error.message) == 20_000
    assert len(error.traceback) == 20_000
    assert error.traceback.endswith(" the end")


def test_a_registered_error_is_known() -> None:
    gw.register_type(Registered)

    error = results.restored(stored("Registered", 3, module=__name__), None)
    assert type(error) is Registered


class Registered(Exception): ...
