from __future__ import annotations

import json
import re

import pytest

from gw_celery import codec, errors


class Doc:
    pass


class Note:
    pass


class BadInput(ValueError):
    pass


class Fatal(SystemExit):
    pass


def remade(cls):
    """The same class made once more, as an autoreload does."""
    return type(cls.__name__, cls.__bases__, {"__module__": cls.__module__, "__doc__": "new"})


def written(registry, value):
    return json.loads(codec.Codec(registry, codec.Limits()).dumps(value))["~obj"][0]


def read(registry, name, payload):
    document = json.dumps({"~obj": [name, payload]})
    return codec.Codec(registry, codec.Limits()).loads(document)


def test_a_class_is_returned_by_the_function_and_by_both_decorators():
    registry = codec.TypeRegistry()
    assert registry.register(Doc) is Doc
    assert registry.register(name="n")(Doc) is Doc

    @registry.register
    class Local:
        pass

    assert registry.written_as(Local).cls is Local


def test_the_default_name_is_module_and_qualname_in_version_one():
    registry = codec.TypeRegistry()
    registry.register(Doc)
    assert written(registry, Doc()) == f"{__name__}.Doc@1"


def test_the_same_class_may_be_registered_twice():
    registry = codec.TypeRegistry()
    registry.register(Doc)
    registry.register(Doc)
    assert type(read(registry, written(registry, Doc()), {})) is Doc


def test_another_class_cannot_take_a_name():
    registry = codec.TypeRegistry()
    registry.register(Doc, name="search.Doc")
    with pytest.raises(errors.DeclarationError, match=r"search\.Doc@1 already names .*\.Doc;"):
        registry.register(Note, name="search.Doc")
    assert type(read(registry, "search.Doc@1", {})) is Doc


def test_a_class_that_was_made_again_replaces_the_old_one():
    registry = codec.TypeRegistry()
    registry.register(Doc)
    new = remade(Doc)
    registry.register(new)
    assert type(read(registry, f"{__name__}.Doc@1", {})) is new
    assert registry.written_as(Doc) is None


def test_the_highest_version_is_written_and_every_version_is_read():
    registry = codec.TypeRegistry()
    registry.register(Doc, name="Doc", version=2, encode=lambda doc: "two", decode=lambda _: 2)
    registry.register(Doc, name="Doc", version=1, encode=lambda doc: "one", decode=lambda _: 1)
    assert written(registry, Doc()) == "Doc@2"
    assert (read(registry, "Doc@1", None), read(registry, "Doc@2", None)) == (1, 2)


def test_a_new_name_is_written_and_the_old_one_is_still_read():
    registry = codec.TypeRegistry()
    registry.register(Doc, name="old", version=5)
    registry.register(Doc, name="new")
    assert written(registry, Doc()) == "new@1"
    assert type(read(registry, "old@5", {})) is Doc


def test_an_unknown_version_tells_which_are_known():
    registry = codec.TypeRegistry()
    registry.register(Doc, name="Doc", version=1)
    registry.register(Doc, name="Doc", version=3)
    with pytest.raises(errors.SerializationError, match=r"'Doc@2' is not registered.* 1, 3:"):
        read(registry, "Doc@2", {})


@pytest.mark.parametrize("name", ["os.system@1", "os.system", "", "@", "@1", "a@b@c"])
def test_an_unknown_name_is_named_with_the_remedy(name):
    expected = f"type {name!r} is not registered here: call gw.register_type"
    with pytest.raises(errors.SerializationError, match=re.escape(expected)):
        read(codec.TypeRegistry(), name, {})


def test_a_name_of_the_sender_cannot_flood_the_message_or_write_to_the_terminal():
    with pytest.raises(errors.SerializationError) as raised:
        read(codec.TypeRegistry(), "\x1b[2J" + "x" * 10_000, {})
    assert len(str(raised.value)) < 500
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"cls": Doc()}, "cls"),
        ({"cls": list[int]}, "cls"),
        ({"cls": int}, "cls"),
        ({"cls": dict}, "cls"),
        ({"cls": Fatal}, "cls"),
        ({"cls": object}, "cls"),
        ({"cls": Doc, "name": ""}, "name"),
        ({"cls": Doc, "name": "a@1"}, "name"),
        ({"cls": Doc, "name": 1}, "name"),
        ({"cls": Doc, "version": 0}, "version"),
        ({"cls": Doc, "version": True}, "version"),
        ({"cls": Doc, "version": "1"}, "version"),
        ({"cls": Doc, "encode": vars}, "decode"),
        ({"cls": Doc, "decode": vars}, "encode"),
    ],
)
def test_a_registration_that_cannot_work_says_which_argument_is_wrong(arguments, argument):
    with pytest.raises(errors.DeclarationError) as raised:
        codec.TypeRegistry().register(**arguments)
    assert raised.value.argument == argument


def test_an_exception_class_is_found_by_its_dotted_name_whatever_messages_call_it():
    registry = codec.TypeRegistry()
    registry.register(BadInput, name="bad")
    assert registry.exception_class(f"{__name__}.BadInput") is BadInput


@pytest.mark.parametrize("name", ["builtins.SystemExit", "builtins.ValueError", f"{__name__}.Doc"])
def test_only_registered_exceptions_are_found(name):
    registry = codec.TypeRegistry()
    registry.register(Doc)
    assert registry.exception_class(name) is None


def test_the_module_functions_use_the_registry_of_the_process():
    codec.register_type(BadInput)
    assert codec.exception_class(f"{__name__}.BadInput") is BadInput
    assert codec.registry.written_as(BadInput).cls is BadInput
