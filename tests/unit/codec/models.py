"""Classes that the tests of the codec register, and a codec that knows them."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from gw_celery import codec


class Color(enum.Enum):
    RED = "r"
    GREEN = "g"
    CRIMSON = "r"  # noqa: PIE796


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Loose(enum.Flag, boundary=enum.CONFORM):
    """Drops unknown bits without a word, as every Flag does on Python 3.11.2."""

    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Doc:
    title: Any
    body: Any = None
    length: Any = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: Any
    y: Any
    norm: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", "computed")


@dataclasses.dataclass(frozen=True)
class Positive:
    value: int

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError("must be positive")


class Bag:
    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class OutOfMemory(Exception):
    def __init__(self, needed: int, unit: str) -> None:
        super().__init__(f"{needed} {unit}")
        self.needed = needed


class Celsius(float):
    pass


registry = codec.TypeRegistry()
for cls in (Color, Level, Word, Access, Loose, Bits, Doc, Point, Positive, Bag, OutOfMemory):
    registry.register(cls)
registry.register(Celsius, name="Celsius", version=3, encode=float, decode=Celsius)

knowing = codec.Codec(registry, codec.Limits())


def there_and_back(value: object) -> Any:
    return knowing.loads(knowing.dumps(value).encode())
