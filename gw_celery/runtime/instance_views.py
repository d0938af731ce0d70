"""Second objects over the loaded state of one instance, each with parameter values of its own."""

from __future__ import annotations

import inspect
import types
from typing import Any

from gw_celery.declare import parameters
from gw_celery.types import ParameterValues

#: Attribute of a view: the instance whose state it shares; ``None`` in that instance.
_SHARED = "_gw_shared"


def view_class(cls: type) -> type:
    """A subclass with room for parameter values beside the shared state of ``cls``."""
    body = {
        **{name: _SharedSlot(slot) for name, slot in _slots(cls).items()},
        "__slots__": (parameters.VALUES, parameters.READS, _SHARED),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        # The class's own __new__ makes handles for callers.
        "__new__": lambda view_class, *args, **kwargs: object.__new__(view_class),
    }
    return type(cls.__name__, (cls,), body)


def instance(of_class: type, values: ParameterValues) -> Any:
    """Return an object of a view class that has a state of its own; its ``__init__`` is to run."""
    made: Any = object.__new__(of_class)
    # Not itself: a cycle would keep what was evicted in memory until a garbage collection.
    object.__setattr__(made, _SHARED, None)
    object.__setattr__(made, parameters.VALUES, values)
    return made


def view(of: Any, values: ParameterValues) -> Any:
    """Return an object that shares the attributes of the instance ``of``."""
    made: Any = object.__new__(type(of))
    made.__dict__ = of.__dict__
    object.__setattr__(made, _SHARED, of)
    object.__setattr__(made, parameters.VALUES, values)
    object.__setattr__(made, parameters.READS, None)
    return made


class _SharedSlot:
    """An attribute that the user's class keeps in ``__slots__``, outside the shared dict."""

    def __init__(self, slot: types.MemberDescriptorType) -> None:
        self._slot = slot

    def __get__(self, view: Any, owner: type) -> Any:
        return self._slot if view is None else self._slot.__get__(_state(view), owner)

    def __set__(self, view: Any, value: object) -> None:
        self._slot.__set__(_state(view), value)

    def __delete__(self, view: Any) -> None:
        self._slot.__delete__(_state(view))


def _state(view: Any) -> Any:
    shared = getattr(view, _SHARED)
    return view if shared is None else shared


def _slots(cls: type) -> dict[str, types.MemberDescriptorType]:
    found = {name: inspect.getattr_static(cls, name) for base in cls.__mro__ for name in vars(base)}
    return {
        name: slot for name, slot in found.items() if isinstance(slot, types.MemberDescriptorType)
    }
