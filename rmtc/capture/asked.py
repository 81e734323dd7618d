"""The names of attributes that a call asks for, so that the others may change without a new capture.

Tools write attributes that no forward reads: that a model is prepared, or in which dtype its configuration was saved.
Two kinds of objects tell at run time which of their attributes are read, also by a computed name or `hasattr`:

- a module looks up in `nn.Module.__getattr__` what it does not have. An attribute that it has got since the capture is
  one that the call did not find, so that every read of it came by there. Code that names `__dict__` or `vars` may read
  past it, and no module may change then;
- a record whose class has a `__getattribute__` in Python, such as the configurations of transformers, looks up there
  all that it has.

Who copies, pickles or lists an object reads all of it. Other objects tell nothing, and all that they hold is guarded.
So is what holds no plain data. A name counts for all
objects at once: a layer whose call was copied from another one's has asked for the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from rmtc.capture.frames import is_own
from rmtc.capture.kinds import MISSING, from_library, is_plain
from rmtc.capture.state import Slot
from rmtc.capture.user_code import named_globals, named_in_code
from rmtc.restoring import restored

if TYPE_CHECKING:
    from rmtc.capture.effects import Effect
    from rmtc.capture.session import Session

_PAST = frozenset(("__getattribute__", "getattr_static", "getmembers_static", "gc", "get_referents", "get_objects"))
"""Names by which code reads attributes of any object past its lookup."""

_INSIDE = _PAST | {"__dict__", "vars"}
"""Names by which code reads attributes of modules past the lookup of those that are not there."""

_WHOLE = ("__reduce_ex__", "__dir__")
"""Methods of modules that read all attributes: what copies and pickles them calls the one, and `dir` the other."""

_TABLE, _TABLE_OF, _read_generic = "__dict__", vars, object.__getattribute__
"""By other names in the functions that note reads: calls of modules are watched for code that names these."""


class Asked:
    """The names of the attributes that the runs of a session have asked for.

    Args:
        records: objects whose attributes are state, other than modules.

    Attributes:
        names: the names.
        whole: whether a run has read an object as a whole, such as its `__dict__`.
    """

    def __init__(self, records: Sequence[object]) -> None:
        self.names: set[str] = set()
        self.whole = False
        self._kinds = {kinds[0] for each in records if (kinds := _noting(type(each)))}
        for kind in {base for each in records for base in _noting(type(each))}:
            self.names.update(named_in_code(vars(kind)["__getattribute__"].__code__))  # read past the lookup itself

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is asked for in a block."""
        with ExitStack() as stack:
            stack.enter_context(_replaced(nn.Module, "__getattr__", self._of_modules))
            for name in _WHOLE:
                stack.enter_context(_replaced(nn.Module, name, self._of_whole))
            for kind in self._kinds:
                stack.enter_context(_replaced(kind, "__getattribute__", self._of_records))
            yield

    def _of_modules(self, original: Any) -> Any:
        names = self.names

        def __getattr__(module: nn.Module, name: str) -> Any:
            names.add(name)
            self.whole |= name == "__deepcopy__"
            return original(module, name)

        return __getattr__

    def _of_whole(self, original: Any) -> Any:
        def read(module: nn.Module, *args: Any) -> Any:
            self.whole = True
            return original(module, *args)

        return read

    def _of_records(self, original: Any) -> Any:
        def __getattribute__(record: Any, name: str) -> Any:
            value = original(record, name)
            if is_own(sys._getframe(1).f_code.co_filename):  # a guard, which looks at all
                return value
            self.names.add(name)
            self.whole |= name.startswith("__") and name != "__class__"  # which `isinstance` reads
            table = _read_generic(record, _TABLE)
            if table.get(name, MISSING) is not value:  # a method, or an attribute that goes by another name, too
                others = [key for key, each in table.items() if each is value]
                self.names.update(others)
                self.whole |= not others and not any(name in _TABLE_OF(base) for base in type(record).__mro__)
            return value

        return __getattribute__


@contextmanager
def _replaced(kind: Any, name: str, noting: Callable[[Any], Any]) -> Iterator[None]:
    """Put a function that notes reads in the place of a method of a class, for a block."""
    before = vars(kind).get(name, MISSING)

    def put_back() -> None:
        if before is not MISSING:
            setattr(kind, name, before)
        elif name in vars(kind):
            delattr(kind, name)

    with restored(put_back):
        setattr(kind, name, noting(getattr(kind, name)))
        yield


def _noting(kind: type) -> list[type]:
    """Return the classes in whose `__getattribute__` the objects of a class look up attributes, the outermost first.

    There are none if one of these is no function of a library's.
    """
    own = [base for base in kind.__mro__ if "__getattribute__" in vars(base) and base is not object]
    known = (from_library(base.__module__) and isinstance(vars(base)["__getattribute__"], FunctionType) for base in own)
    return own if all(known) else []


def _notes_misses(kind: type) -> bool:
    """Return whether the modules of a class look up in `nn.Module.__getattr__` what they do not have."""
    first = next(base for base in kind.__mro__ if "__getattr__" in vars(base))
    return first is nn.Module and kind.__getattribute__ is object.__getattribute__  # type: ignore[comparison-overlap]


class Unread:
    """The attributes that a capture has not read, and that may hold other plain data than at the capture.

    Args:
        session: the capture's.
        effects: the places that its call writes. What leads to them is followed in each call.
    """

    def __init__(self, session: Session, effects: Sequence[Effect]) -> None:
        self._asked, self._named = session.asked, session.named
        self._paths = {(id(at.owner), at.key) for effect in effects for at in effect.slot.path()}
        held = [slot.value for slot in session.snapshot.slots]
        held += [value for function in session.code.functions for _, _, value in named_globals(function)]
        told = _PAST.isdisjoint(self._named) and not any(value is _read_generic for value in held)
        misses_told = told and _INSIDE.isdisjoint(self._named) and not any(value is vars for value in held)
        objects = [each for each in session.snapshot.objects if each.table is not None]
        records = [each for each in objects if not isinstance(each.value, nn.Module) and _noting(each.kind)]
        modules = [each for each in objects if isinstance(each.value, nn.Module) and _notes_misses(each.kind)]
        self._records = {id(each.table) for each in records if told}
        self._modules = {id(each.table): each.kind for each in modules if misses_told}
        self._others: set[tuple[int, Any]] = set()  # places that hold something else than at the capture

    def read_since(self) -> str | None:
        """Return the name of an attribute that a later run has asked for, and that was taken for unread before."""
        if not self._others or not (self._asked.whole or any(key in self._asked.names for _, key in self._others)):
            return None
        return next((key for _, key in self._others if key in self._asked.names), "an attribute")

    def holds(self, slot: Slot, now: object) -> bool:
        """Tell whether a place may hold something else, and note that it does."""
        place = id(slot.owner), slot.key
        may = place in self._others or (id(slot.owner) in self._records and place not in self._paths)
        if not may or not self._may(slot.key) or not _is_data(slot.value) or not _is_data(now):
            return False
        self._others.add(place)
        return True

    def more(self, table: dict[Any, Any], before: Sequence[Any], now: Sequence[Any]) -> list[Slot]:
        """Return the places that a module has got, and note them; none if one of them counts.

        Args:
            table: the dictionary of the module's attributes.
            before, now: its keys, but for those that the call writes.
        """
        if (kind := self._modules.get(id(table))) is None:
            return []
        known = {*before}
        added = [key for key in now if key not in known]
        if [key for key in now if key in known] != [*before]:
            return []
        for key in added:
            of_class = any(key in vars(base) for base in kind.__mro__)
            if of_class or key in self._named or not self._may(key) or not _is_data(table[key]):
                return []
        self._others.update((id(table), key) for key in added)
        return [Slot(f"{kind.__qualname__}.{key}", table, key, table[key]) for key in added]

    def _may(self, key: Any) -> bool:
        return type(key) is str and not self._asked.whole and key not in self._asked.names


def _is_data(value: object) -> bool:
    """Return whether a value is plain data, or a list of it: no tensor, no module, nothing that a call writes to."""
    return is_plain(value) or (type(value) is list and all(map(is_plain, value)))
