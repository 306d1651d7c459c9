"""`dataclass` for the values that every command loads: it compiles nothing before it is needed.

The one of the standard library imports `inspect`, and compiles some six functions for each class. With the 17 classes
that `agentbus send` loads, this was a third of its time. This one means the same, for `frozen=True, slots=True` and
plain defaults, and compiles `__init__` alone, when the first value is made; `replace`, `fields`, `asdict`, `copy` and
`pickle` take its values as they take the others. A type checker sees the one of the standard library.
"""

from __future__ import annotations

from operator import attrgetter

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass
    from typing import Any, ClassVar

__all__ = ["dataclass"]


class _AsDataclass:
    """What `dataclasses` looks for in its classes. Made by itself, when something asks for it."""

    def __init__(self, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, value: _Value | None, of: type[_Value]) -> Any:
        from dataclasses import make_dataclass

        fields = [
            (name, kind, of._defaults[name]) if name in of._defaults else (name, kind)
            for name, kind in of._kinds.items()
        ]
        return getattr(make_dataclass(of.__name__, fields, frozen=True, kw_only=of._kw_only), self._attribute)


class _Value:
    __slots__ = ()

    # The annotations of all fields by name, in their order, and their defaults.
    _kinds: ClassVar[dict[str, Any]] = {}
    _defaults: ClassVar[dict[str, Any]] = {}
    _kw_only: ClassVar[bool] = False
    # The class and the values of all fields.
    _whole: ClassVar[Callable[[object], tuple[Any, ...]]]

    __dataclass_fields__ = _AsDataclass("__dataclass_fields__")
    __dataclass_params__ = _AsDataclass("__dataclass_params__")

    def __getstate__(self) -> tuple[Any, ...]:
        return type(self)._whole(self)[1:]

    def __setstate__(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self._kinds, values, strict=True):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if self.__class__ is not other.__class__:
            return NotImplemented
        whole = type(self)._whole
        return whole(self) == whole(other)

    def __hash__(self) -> int:
        return hash(type(self)._whole(self))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._kinds)
        return f"{self.__class__.__qualname__}({shown})"

    def __setattr__(self, name: str, value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")


def _first_init(self: Any, *values: Any, **named: Any) -> None:
    """The `__init__` of each class, until its first value is made: then it makes the real one."""
    cls = type(self)
    cls.__init__ = _compiled_init(cls)
    self.__init__(*values, **named)


def _compiled_init(cls: type[_Value]) -> Any:
    lines = [f"def __init__(self, {'*, ' if cls._kw_only else ''}{', '.join(cls._kinds)}):"]
    lines += [f" put(self, {name!r}, {name})" for name in cls._kinds]
    if hasattr(cls, "__post_init__"):
        lines.append(" self.__post_init__()")
    scope: dict[str, Any] = {"put": object.__setattr__}
    exec("\n".join(lines), scope)  # noqa: S102 - of the names of our own fields; a loop over them takes four times as long
    made = scope["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    if cls._kw_only:
        made.__kwdefaults__ = cls._defaults
    else:
        made.__defaults__ = tuple(cls._defaults.values())
    return made


def _dataclass(*, frozen: bool, slots: bool, kw_only: bool = False) -> Callable[[type], type]:
    assert frozen, "a value does not change"
    assert slots, "a value has its fields alone"

    def made(cls: type) -> type:
        own = cls.__annotations__
        base: type[_Value] = cls.__bases__[0] if issubclass(cls, _Value) else _Value
        kinds = {**base._kinds, **own}
        body = {name: what for name, what in vars(cls).items() if name not in (*own, "__dict__", "__weakref__")}
        body |= {
            "__qualname__": cls.__qualname__,
            "__slots__": tuple(own),
            "__match_args__": () if kw_only else tuple(kinds),
            "__init__": _first_init,
            "_kinds": kinds,
            "_defaults": {**base._defaults, **{name: vars(cls)[name] for name in own if name in vars(cls)}},
            "_kw_only": kw_only,
            "_whole": attrgetter("__class__", *kinds),
        }
        return type(cls.__name__, (base,), body)

    return made


if not TYPE_CHECKING:
    dataclass = _dataclass
