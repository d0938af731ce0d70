"""Runtime parameters of a class task: ``threshold: float = gw.parameter(default=0.5)``.

Inside an instance a parameter reads as its value. Reads are recorded while ``on_enter`` runs: calls
share loaded state only when they agree on the parameters that it was made from.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import types
import typing
from typing import Any, Literal

from gw_celery import errors
from gw_celery.declare import check
from gw_celery.types import ParameterValues

#: Attribute of an instance: parameter name -> value.
VALUES = "_gw_values"
#: Attribute of an instance: while it loads, the set of names that were read so far; afterwards a
#: frozenset of those that its state was made from; ``None`` where every parameter may be read.
READS = "_gw_reads"


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


class Parameter:
    """A declared parameter; on an instance it is a read-only attribute with the call's value."""

    def __init__(self, default: Any, scope: Literal["load", "call"] | None) -> None:
        if scope not in (None, "load", "call"):
            raise errors.DeclarationError("scope", scope, 'must be "load", "call" or left out')
        self.default = default
        self.scope = scope
        self.name = ""
        self.annotation: Any = Any

    def __repr__(self) -> str:
        return f"gw.parameter({'' if self.is_required else f'default={self.default!r}'})"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        values = getattr(instance, VALUES, None)
        if values is None:
            raise errors.UsageError(
                f"parameter {self.name!r} was read on an object of {owner.__name__} that was not "
                f"made by its service; call it through {owner.__name__}(...)"
            )
        reads: set[str] | frozenset[str] | None = getattr(instance, READS, None)
        if isinstance(reads, set):
            reads.add(self.name)
        elif reads is not None and self.name not in reads:
            # Many calls share what was loaded, and each has a value of its own.
            raise errors.UsageError(
                f"parameter {self.name!r} was read through the `self` that {owner.__name__} was "
                f"loaded with, which has no caller: hand over `self.{self.name}` in the method "
                f'that is called, or declare it with scope="load"'
            )
        return values[self.name]

    def __set__(self, instance: object, value: object) -> None:
        if value is self:
            return  # the __init__ of a dataclass, which takes this for the field's default
        raise errors.UnknownAttribute(
            f"parameter {self.name!r} is read-only: pass {self.name}={value!r} at the call, "
            f"or keep state in another attribute"
        )

    @property
    def is_required(self) -> bool:
        return isinstance(self.default, _Required)

    def accept(self, value: Any) -> Any:
        """Return ``value`` as the annotated type, or raise ``DeclarationError``.

        An int becomes a float where a float is declared; a bool is never taken for a number.
        """
        if isinstance(value, float) and not math.isfinite(value):
            raise errors.DeclarationError(self.name, value, "must be a finite number")
        try:
            arriving = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            arriving = REQUIRED
        if arriving != value:  # it would arrive as another one
            rule = "parameters travel as JSON: str, numbers, bool, None, list, dict of str"
            raise errors.DeclarationError(self.name, value, rule)
        try:
            return _fitted(arriving, self.annotation)
        except _Misfit:
            kind = self.annotation
            readable = kind.__name__ if isinstance(kind, type) else str(kind)
            raise errors.DeclarationError(self.name, value, f"must be {readable}") from None


@check.knows_its_keywords("gw.parameter")
def parameter(default: Any = REQUIRED, *, scope: Literal["load", "call"] | None = None) -> Any:
    """Declare a parameter that callers set: ``Cls(threshold=0.7).classify.delay(...)``.

    Args:
        default: value when the caller gives none; without it the caller must.
        scope: ``"load"``: a new value is a new instance; ``"call"``: it never is; left out, a
            parameter that ``on_enter`` reads is a load parameter.

    Raises:
        DeclarationError: for another scope; by ``@app.cls``, for a default of another type than
            the attribute is annotated with.
    """
    return Parameter(default, scope)


def declared(cls: type) -> dict[str, Parameter]:
    """Return the parameters of ``cls`` and its bases, with their annotations resolved.

    Raises:
        DeclarationError: when a default does not fit its annotation.
    """
    parameters: dict[str, Parameter] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Parameter):
                value.annotation = _annotation(base, name)
                parameters[name] = value
            else:
                parameters.pop(name, None)
    signature = inspect.signature(inspect.getattr_static(cls, "__init__"))
    for name, argument in signature.parameters.items():
        default = argument.default
        if isinstance(default, Parameter) and default is not parameters.get(name):
            raise errors.DeclarationError(
                name,
                default,
                "is no attribute of the class any more: `slots=True` of its decorator takes it "
                "away, so leave that out",
            )
    for parameter in parameters.values():
        if not parameter.is_required:
            parameter.default = parameter.accept(parameter.default)
    return parameters


def bind(owner: str, parameters: dict[str, Parameter], values: ParameterValues) -> dict[str, Any]:
    """Return the values that a caller gave, checked; defaults are not among them.

    Args:
        owner: name of the class, for error messages.
        parameters: its parameters by name.
        values: of the caller, by name.

    Raises:
        DeclarationError: for an unknown name, a wrong type, or a required one left out.
    """
    for name, value in values.items():
        if name not in parameters:
            listed = ", ".join(parameters) or "none"
            raise errors.DeclarationError(name, value, f"{owner} has parameters: {listed}")
    for name, parameter in parameters.items():
        if parameter.is_required and name not in values:
            raise errors.DeclarationError(name, None, f"{owner} needs a value for it")
    return {name: parameters[name].accept(value) for name, value in values.items()}


def complete(parameters: dict[str, Parameter], values: ParameterValues) -> dict[str, Any]:
    """Return ``values`` with the defaults of the parameters that it leaves out.

    Each call gets copies: a body that changes a list must not change the default of the next call.
    """
    return {
        name: values[name] if name in values else copy.deepcopy(parameter.default)
        for name, parameter in parameters.items()
    }


def canonical(values: ParameterValues) -> str:
    """Return the canonical JSON text of ``values``, as it travels in a message header."""
    return _CANONICAL.encode(values)


def _annotation(cls: type, name: str) -> Any:
    """The annotation of an attribute, by itself: an unresolvable one must not hide the others."""
    written = inspect.get_annotations(cls).get(name, Any)
    holder = type(
        cls.__name__, (), {"__annotations__": {name: written}, "__module__": cls.__module__}
    )
    try:
        return typing.get_type_hints(holder, localns=dict(vars(cls)))[name]
    except Exception:  # a name that exists only for type checkers
        return Any


class _Misfit(Exception):
    """Raised for a value that is not of the annotated type."""


def _fitted(value: Any, annotation: Any) -> Any:
    """Return ``value`` as the annotated type: an int becomes a float where one is declared.

    A bool is never taken for a number. What has no meaning for JSON fits every value.

    Raises:
        _Misfit: for a value of another type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        fits = []
        for option in arguments:
            with contextlib.suppress(_Misfit):
                fits.append(_fitted(value, option))
        if not fits:
            raise _Misfit
        # The first option that leaves its type, else the first that fits.
        return next((fit for fit in fits if type(fit) is type(value)), fits[0])
    expected = dict if typing.is_typeddict(annotation) else origin or annotation or types.NoneType
    if expected is Any:
        return value
    if expected is Literal:
        is_fit = any(value == entry and type(value) is type(entry) for entry in arguments)
    elif expected is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _Misfit from None
    elif not isinstance(expected, type):
        is_fit = True
    else:
        is_bool = isinstance(value, bool)
        is_fit = expected in (bool, object) if is_bool else isinstance(value, expected)
    if not is_fit:
        raise _Misfit
    if isinstance(value, list) and len(arguments) == 1:
        return [_fitted(entry, arguments[0]) for entry in value]
    if isinstance(value, dict) and len(arguments) == 2:
        keys, values = arguments
        return {_fitted(key, keys): _fitted(entry, values) for key, entry in value.items()}
    return value
