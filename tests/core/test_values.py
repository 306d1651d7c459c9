"""Values: our `dataclass` against the one of the standard library, which it stands in for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import pprint
from collections.abc import Callable
from typing import Any

import pytest

from agentbus.core import values

Decorator = Callable[..., Any]


def classes(dataclass: Decorator) -> tuple[type, type, type]:
    @dataclass(frozen=True, slots=True)
    class Letter:
        """A letter."""

        id: int
        text: str
        reply_to: int | None = None

        def __str__(self) -> str:
            return f"#{self.id} {self.text}"

    @dataclass(frozen=True, slots=True)
    class Stamped(Letter):
        """A letter with a state."""

        at: int = 0

        @property
        def is_sent(self) -> bool:
            return self.at > 0

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Named:
        """All by name, and one field mended."""

        first: str
        last: str = "?"

        def __post_init__(self) -> None:
            object.__setattr__(self, "first", self.first.upper())

    return Letter, Stamped, Named


OURS = classes(values.dataclass)
THEIRS = classes(dataclasses.dataclass)


@pytest.fixture(params=[OURS, THEIRS], ids=["ours", "the standard library's"])
def kinds(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_fields_come_by_place_by_name_and_by_default(kinds: Any) -> None:
    letter, stamped, named = kinds
    assert letter(1, "hi") == letter(id=1, text="hi", reply_to=None) == letter(1, text="hi")
    assert (stamped(1, "hi", 2, 3).at, stamped(1, "hi").at, stamped(1, "hi", at=4).reply_to) == (3, 0, None)
    assert stamped(1, "hi", at=4).is_sent
    assert (named(first="a").first, named(first="a").last) == ("A", "?")


@pytest.mark.parametrize(
    "make",
    [
        lambda letter, _named: letter(1),
        lambda letter, _named: letter(1, "a", 2, 3),
        lambda letter, _named: letter(1, "a", id=2),
        lambda letter, _named: letter(1, "a", other=2),
        lambda _letter, named: named("a"),
        lambda _letter, named: named("a", first="b"),
        lambda _letter, named: named(),
    ],
)
def test_other_fields_are_refused(kinds: Any, make: Callable[[type, type], object]) -> None:
    with pytest.raises(TypeError):
        make(kinds[0], kinds[2])


def test_a_value_is_what_its_fields_are(kinds: Any) -> None:
    letter, stamped, _ = kinds
    assert letter(1, "hi") != letter(2, "hi")
    assert letter(1, "hi") != stamped(1, "hi")  # another class
    assert letter(1, "hi") != (1, "hi", None)
    assert {letter(1, "hi"), letter(1, "hi"), letter(2, "hi")} == {letter(1, "hi"), letter(2, "hi")}
    assert repr(stamped(1, "hi")) == "classes.<locals>.Stamped(id=1, text='hi', reply_to=None, at=0)"
    assert str(stamped(1, "hi")) == "#1 hi"
    match letter(1, "hi"):
        case letter(id, text):  # type: ignore[misc]
            assert (id, text) == (1, "hi")


def test_a_value_cannot_be_changed_and_has_no_other_attribute(kinds: Any) -> None:
    made = kinds[1](1, "hi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.at = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        del made.at
    # A slot keeps it out even of what goes around.
    with pytest.raises(AttributeError):
        object.__setattr__(made, "more", 1)
    assert not hasattr(made, "__dict__")


def test_what_works_on_dataclasses_works_on_values(kinds: Any) -> None:
    letter, stamped, named = kinds
    made = stamped(1, "hi")
    assert dataclasses.is_dataclass(made)
    assert dataclasses.is_dataclass(stamped)
    assert [(one.name, one.type, one.default) for one in dataclasses.fields(stamped)] == [
        ("id", "int", dataclasses.MISSING),
        ("text", "str", dataclasses.MISSING),
        ("reply_to", "int | None", None),
        ("at", "int", 0),
    ]
    assert dataclasses.asdict(made) == {"id": 1, "text": "hi", "reply_to": None, "at": 0}
    changed = dataclasses.replace(made, at=7)
    assert (type(changed), changed, made.at) == (stamped, stamped(1, "hi", None, 7), 0)
    assert dataclasses.replace(named(first="a"), last="b") == named(first="a", last="b")
    assert copy.copy(made) == copy.deepcopy(made) == made
    assert "id=1, text='hi'" in pprint.pformat(letter(1, "hi"))


def test_a_value_of_the_bus_can_be_pickled() -> None:
    from agentbus import Envelope

    envelope = Envelope(1, "web", "ci", "hi", 0)
    assert pickle.loads(pickle.dumps(envelope)) == envelope
    assert dataclasses.replace(envelope, text="other").text == "other"
