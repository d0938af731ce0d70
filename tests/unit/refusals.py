"""How the tests of declarations look at what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gw_celery import errors

#: What no count and no duration is.
NOT_NUMBERS: tuple[Any, ...] = (True, False, "3", None, [1], 1j)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def refused(declare: Callable[..., Any], *args: Any, **kwargs: Any) -> errors.DeclarationError:
    """Return what ``declare`` raises; its message has the argument, the value and the rule."""
    with pytest.raises(errors.DeclarationError) as caught:
        declare(*args, **kwargs)
    error = caught.value
    assert str(error) == f"{error.argument}={error.value!r}: {error.rule}"
    assert error.rule
    return error
