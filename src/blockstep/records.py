"""Records for what starts in a hurry: the modules that a short command imports.

The import of `msgspec` takes 8 ms and that of `typing` 3, and each `NamedTuple` 0.2 more; all of a short command is 20.
The fields of a `Record` are declared as theirs, and mypy checks the types, and that nobody assigns to a field:

    class Place(Record):
        offset: int
        length: int = 0

To make one takes some microseconds. So it is for what there are few of, as the header of an image, and not for what
there is one of in each request. A class of records is not derived from further.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:
    def dataclass_transform(**_):  # it says something to mypy only
        return lambda kind: kind


@dataclass_transform(frozen_default=True)
class Record:
    """Values with names. Two of a class are equal if all of their fields are."""

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)

    def __init__(self, *values: Any, **named: Any) -> None:
        """The values in the order of the fields, or by name; those with a default may be left out. Raises TypeError."""
        given = self.__dict__
        given.update(zip(self._fields, values, strict=False), **named)
        if len(given) != len(values) + len(named) or any(name not in self._fields for name in named) \
                or not all(hasattr(self, name) for name in self._fields):
            raise TypeError(f"a {type(self).__name__} is made of {', '.join(self._fields)}")

    def replaced(self, **changes: Any) -> Self:
        """Another one, with these fields changed. Raises TypeError."""
        return type(self)(**{**self.__dict__, **changes})

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(
            getattr(self, name) == getattr(other, name) for name in self._fields)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self._fields))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"
