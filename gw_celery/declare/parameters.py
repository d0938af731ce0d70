"""Parameters of a class task, ``threshold: float = gw.parameter(default=0.5)``, in every process.

On an instance a parameter reads as its value. The instance records which parameters ``on_enter``
reads: two calls share loaded state only if they agree on those parameters.
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
#: Attribute of an instance. While it loads: the set of the parameters read so far. Afterwards: the
#: frozenset of those that its state depends on; ``None`` where every parameter may be read.
READS = "_gw_reads"


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


class Parameter:
    """A declared parameter; on an instance, a read-only attribute with the value of the call."""

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
            # Several calls share the loaded state, and each has its own value.
            raise errors.UsageError(
                f"parameter {self.name!r} was read through the `self` that {owner.__name__} was "
                f"loaded with, which has no caller: hand over `self.{self.name}` in the method "
                f'that is called, or declare it with scope="load"'
            )
        return values[self.name]

    def __set__(self, instance: object, value: object) -> None:
        if value is self:
            return  # a dataclass's __init__ assigns the descriptor, as the field's default
        raise errors.UnknownAttribute(
            f"parameter {self.name!r} is read-only: pass {self.name}={value!r} at the call, "
            f"or keep state in another attribute"
        )

    @property
    def is_required(self) -> bool:
        return isinstance(self.default, _Required)

    def accept(self, value: Any) -> Any:
        """Return ``value`` as the annotated type.

        An int becomes a float where a float is declared. A bool is not accepted as a number.

        Raises:
            DeclarationError: if the value has another type, or changes when it travels as JSON.
        """
        if isinstance(value, float) and not math.isfinite(value):
            raise errors.DeclarationError(self.name, value, "must be a finite number")
        try:
            arriving = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            arriving = REQUIRED
        if arriving != value:  # it would arrive as a different value
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
        default: value if the caller gives none; without a default, the caller must give one.
        scope: ``"load"``: a new value requires a new instance; ``"call"``: it never does. If left
            out, a parameter that ``on_enter`` reads is a load parameter.

    Returns:
        The descriptor to assign to an annotated attribute of the class.

    Raises:
        DeclarationError: for an unknown scope. ``@app.cls`` raises it if the default does not fit
            the annotation of the attribute.
    """
    return Parameter(default, scope)


def declared(cls: type) -> dict[str, Parameter]:
    """Return the parameters of ``cls`` and its bases, with their annotations resolved.

    Raises:
        DeclarationError: if a default does not fit its annotation.
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
    """Check the parameter values of a caller and return them, without the defaults.

    Args:
        owner: name of the class, for error messages.
        parameters: the declared parameters by name.
        values: the caller's values by name.

    Raises:
        DeclarationError: for an unknown name, a wrong type, or a missing required parameter.
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
    """Return ``values``, and the defaults of the parameters that are missing in it.

    Each call gets copies, because a body that changes a list must not change a default.
    """
    return {
        name: values[name] if name in values else copy.deepcopy(parameter.default)
        for name, parameter in parameters.items()
    }


def canonical(values: ParameterValues) -> str:
    """Return ``values`` as canonical JSON, the form of the message header."""
    return _CANONICAL.encode(values)


def _annotation(cls: type, name: str) -> Any:
    """Resolve one annotation alone, so that an unresolvable one does not hide the others."""
    written = inspect.get_annotations(cls).get(name, Any)
    holder = type(
        cls.__name__, (), {"__annotations__": {name: written}, "__module__": cls.__module__}
    )
    try:
        return typing.get_type_hints(holder, localns=dict(vars(cls)))[name]
    except Exception:  # a name that exists only for type checkers
        return Any


class _Misfit(Exception):
    """Raised if a value does not have the annotated type."""


def _fitted(value: Any, annotation: Any) -> Any:
    """Return ``value`` as the annotated type; an annotation without meaning for JSON fits all.

    Raises:
        _Misfit: if the value has another type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        fits = []
        for option in arguments:
            with contextlib.suppress(_Misfit):
                fits.append(_fitted(value, option))
        if not fits:
            raise _Misfit
        # Prefer the first option that keeps the type, else the first that fits.
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
