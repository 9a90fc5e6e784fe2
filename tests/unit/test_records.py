"""A record is made as it is declared, compared by its fields, and changed by making another."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockstep.records import Record


class Place(Record):
    offset: int
    length: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


class Other(Record):
    offset: int
    length: int = 0


def test_fields_are_given_in_order_or_by_name_and_have_defaults() -> None:
    assert Place(3, 4) == Place(3, length=4) == Place(offset=3, length=4)
    assert (Place(3).offset, Place(3).length, Place(3, 4).end) == (3, 0, 7)


def test_records_are_equal_if_they_are_of_one_class_with_equal_fields() -> None:
    assert len({Place(3), Place(3, 0), Place(offset=3)}) == 1
    assert Place(3) != Place(4)
    assert Place(3) != Other(3)
    assert repr(Place(3)) == "Place(offset=3, length=0)"


def test_what_is_changed_is_another_record() -> None:
    place = Place(3)
    assert place.replaced(length=4) == Place(3, 4)
    assert place == Place(3)


@pytest.mark.parametrize("make", [
    lambda: Place(), lambda: Place(length=1), lambda: Place(1, 2, 3), lambda: Place(1, offset=2),
    lambda: Place(1, size=2), lambda: Place(1).replaced(size=2)])
def test_a_record_is_made_of_its_fields_and_nothing_else(make: Callable[[], Place]) -> None:
    with pytest.raises(TypeError, match="a Place is made of offset, length"):
        make()
