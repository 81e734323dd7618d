"""Guards: what a compiled call was captured under, and whether a later call is made under the same."""

from __future__ import annotations

import operator
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Sized
from itertools import chain
from types import CellType, FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._device import DeviceContext

from rmtc.capture.arguments import Arguments, Path, show
from rmtc.capture.effects import GONE, Effect
from rmtc.capture.probe import Plan, Sizes
from rmtc.capture.session import Session
from rmtc.capture.state import MISSING, Slot, is_plain, names_of

__all__ = ["ArgumentGuard", "StateGuard", "alike", "global_hooks", "hook_tables", "hooked", "modes"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OF_CLASSES = frozenset(vars(type("", (), {}))) | {"__abstractmethods__", "_abc_impl"}
_CAPTURING = "transformers.utils.output_capturing"  # hooks that do nothing unless the model's own code asks


def modes() -> tuple[Any, ...]:
    """The modes of torch that a call's result depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )


def hooked(modules: Sequence[nn.Module], tables: Sequence[Mapping[int, Any]]) -> str | None:
    """Why a call must run as it is because someone watches it; None if nobody does.

    Args:
        modules: the submodules, for the message.
        tables: their tables of hooks, four for each.
    """
    if (general := global_hooks()) is not None:
        return general
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active (TorchDispatchMode)"
    if torch._C._len_torch_function_stack() and any(
        not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a function mode is active (TorchFunctionMode)"
    if any(tables):
        for number, table in enumerate(tables):
            for hook in table.values():
                if getattr(hook, "__module__", None) != _CAPTURING:
                    name = type(modules[number // len(_HOOKS)]).__name__
                    return f"there is a hook on a submodule ({name}), which would not be called"
    return None


def global_hooks() -> str | None:
    """Why a call must run as it is because hooks watch every module; None if none does."""
    general = torch.nn.modules.module
    if general._global_forward_hooks or general._global_forward_pre_hooks:
        return "there are global forward hooks (torch.nn.modules.module)"
    return None


def hook_tables(modules: Sequence[nn.Module]) -> list[Mapping[int, Any]]:
    """The tables of hooks of some modules, in the order :func:`hooked` expects."""
    return [getattr(module, name) for module in modules for name in _HOOKS]


class _Given(NamedTuple):
    """A tensor that is an argument; a size that is free is -1."""

    kind: type
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    shape: tuple[int, ...]
    strides: tuple[Any, ...] | None
    requires_grad: bool

    def __str__(self) -> str:
        sizes = ["any" if size < 0 else str(size) for size in self.shape]
        kind = "" if self.strides is None else ", not contiguous"
        kind += ", requires gradients" if self.requires_grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(sizes)}] on {self.device}{kind}"


class ArgumentGuard:
    """The structure of a call's arguments, and the sizes of a later call with it.

    Args:
        session: the call.
        plan: its sizes.
    """

    def __init__(self, session: Session, plan: Plan) -> None:
        self._plan, self._strides, arguments = plan, session.asks_for_strides, session.arguments
        self._dims: dict[Path, tuple[int, ...]] = {}
        for path, dim in plan.growth.dims:
            self._dims[path] = (*self._dims.get(path, ()), dim)
        given = self._given(arguments)
        self._leaves = {path: self._describe(path, leaf) for path, leaf in given.items()}
        self._pattern = _pattern(given)

    def sizes(self, arguments: Arguments) -> Sizes | str:
        """The sizes of a call; or in what it differs.

        Args:
            arguments: those of the call.
        """
        given = self._given(arguments)
        if given.keys() != self._leaves.keys():
            other = sorted(map(show, given.keys() ^ self._leaves.keys()))
            return f"other arguments are given: {', '.join(other)}"
        for path, leaf in given.items():
            if not self._alike(self._leaves[path], self._describe(path, leaf)):
                return f"argument {show(path)} is another: {self._leaves[path]} before, {self._describe(path, leaf)}"
        if _pattern(given) != self._pattern:
            return "two arguments were one tensor and are two, or the other way round"
        lengths: set[int] = set()
        batches: set[int] = set()
        plan = self._plan
        for path, leaf in given.items():
            if isinstance(leaf, torch.Tensor):
                lengths |= {leaf.shape[dim] for dim in self._dims.get(path, ())}
                if any(path[: len(each)] == each for each in plan.growth.batch):
                    batches.add(leaf.shape[0])
        lists = arguments.lists()
        lengths |= {lists[path] for path in plan.growth.lists if path in lists}
        if len(lengths) != 1 or len(batches) > 1:
            return f"arguments that agreed in length or batch do not: {sorted(lengths)}, {sorted(batches)}"
        length, batch = lengths.pop(), batches.pop() if batches else plan.sizes.batch
        if not length:
            return "the text is empty"
        segments = -(-length // plan.segment_length)
        return Sizes(segments, batch, length - (segments - 1) * plan.segment_length)

    def _given(self, arguments: Arguments) -> dict[Path, Any]:
        """The leaves by path; of a list with one item a segment, the first item's."""
        growing = self._plan.growth.lists
        return {
            path: leaf
            for path, leaf in arguments.leaves().items()
            if not any(path[: len(each)] == each and len(path) > len(each) and path[len(each)] for each in growing)
        }

    def _describe(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        free = set(self._dims.get(path, ()))
        if any(path[: len(each)] == each for each in self._plan.growth.batch):
            free.add(0)
        shape = tuple(-1 if dim in free else size for dim, size in enumerate(leaf.shape))
        told = self._strides and leaf.layout is torch.strided and not leaf.is_contiguous()
        strides = _kind_of_strides(leaf) if told else None
        return _Given(type(leaf), leaf.dtype, leaf.device, leaf.layout, shape, strides, leaf.requires_grad)

    @staticmethod
    def _alike(one: Any, other: Any) -> bool:
        return one is other or (one == other if isinstance(one, _Given) else alike(one, other))


def _pattern(given: Mapping[Path, Any]) -> list[int]:
    """For each tensor, the first place where the same one is given."""
    first: dict[int, int] = {}
    return [first.setdefault(id(leaf), len(first)) for leaf in given.values() if isinstance(leaf, torch.Tensor)]


def _kind_of_strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """In which order the dimensions of a tensor lie, and whether they are repeated or have gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (strides[dim], -dim))
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(tensor)
    return tuple(order), dense, tuple(not stride for stride in strides)


def _getter(slot: Slot) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    if isinstance(slot.owner, (dict, list, deque, tuple, MappingProxyType)):
        return operator.getitem, slot.owner, slot.key
    return getattr, slot.owner, str(slot.key) if not isinstance(slot.owner, CellType) else "cell_contents"


def _whole_lists(slots: Sequence[Slot], effects: Sequence[Effect]) -> set[tuple[int, Any]]:
    """The places of lists whose items the call writes: another list may be there, if it is in no second place."""
    written = {id(effect.slot.owner) for effect in effects if effect.whole and effect.slot.parent is not None}
    places: dict[int, list[Slot]] = {}
    for slot in slots:
        if id(slot.value) in written:
            places.setdefault(id(slot.value), []).append(slot)
    return {(id(slot.owner), slot.key) for slot, *more in places.values() if not more}


def _held(slot: Slot) -> Any:
    """What a place holds, as :meth:`StateGuard.differs` reads it; not itself if there is nothing."""
    get, owner, key = _getter(slot)
    try:
        return get(owner, key)
    except (KeyError, IndexError, AttributeError, ValueError):
        return MISSING


class StateGuard:
    """Everything in Python that a capture could see: attributes, globals, closures, by identity.

    Args:
        session: the capture's.
        effects: the places that the call itself writes, which are left out here.
    """

    def __init__(self, session: Session, effects: Sequence[Effect]) -> None:
        places = {(id(effect.slot.owner), effect.slot.key) for effect in effects if not effect.whole}
        self._places = places | _whole_lists(session.snapshot.slots, effects)
        self._lists = {id(effect.slot.owner) for effect in effects if effect.whole}
        slots = [slot for slot in session.snapshot.slots if not self._written(slot)]
        read = (tuple, type)  # a class is read at once, below
        self._slots = [slot for slot in slots if slot.key not in _BOOKKEEPING and not isinstance(slot.owner, read)]
        code = session.code
        for name, space, value in code.named:
            self._slots.append(Slot(name, space, name, value))
        for function in code.functions:
            for key in ("__code__", "__defaults__", "__kwdefaults__"):
                self._slots.append(Slot(f"{function.__qualname__}.{key}", function, key, getattr(function, key)))
        for kind in code.classes:
            held = vars(kind)
            for key, value in held.items():
                if key not in _OF_CLASSES and (id(kind), key) not in places:
                    self._slots.append(Slot(f"{kind.__qualname__}.{key}", held, key, value))
        modules = session.all_modules()
        for module in modules:  # `ModuleList.pop` makes a new table
            for key in _TABLES:
                self._slots.append(Slot(f"{type(module).__qualname__}.{key}", vars(module), key, vars(module)[key]))
        for kind in {type(module): None for module in modules}:
            self._slots.append(Slot(f"{kind.__qualname__}.forward", kind, "forward", kind.forward))
        self._slots = list({(id(slot.owner), slot.key): slot for slot in self._slots}.values())
        self.modules, self._kinds = modules, [*map(type, modules)]
        self._environment = _environment() if any(map(_reads_environment, code.functions)) else None
        sets = [owner for owner in session.snapshot.owners() if isinstance(owner, set)]
        self._sets = sets, [*map(frozenset, sets)]
        self._arrays = [(array, content.tobytes()) for array, content in session.snapshot.arrays]
        self._requiring = (
            [(lifted.tensor, lifted.tensor.requires_grad) for lifted in session.lifted]
            if session.asks_for_gradients
            else []
        )
        self._index()
        self._containers = {id(effect.slot.owner) for effect in effects}
        self._aliases = self._given(self._expected, session.arguments)
        # Keys that the call itself adds or removes, and lists that it writes as a whole.
        own: dict[int, set[Any]] = {}
        for effect in effects:
            owner = effect.slot.owner
            if effect.whole or effect.content is GONE or not isinstance(owner, dict) or effect.slot.key not in owner:
                own.setdefault(id(owner), set()).add(effect.slot.key)
        changing = set(own)
        # Tables of hooks have a check of their own.
        changing |= {id(vars(module)[key]) for module in modules for key in _BOOKKEEPING}
        self._sized: list[Sized] = [
            owner
            for owner in {id(owner): owner for owner in session.snapshot.owners()}.values()
            if isinstance(owner, (dict, list, deque)) and id(owner) not in changing and "__builtins__" not in owner
        ]
        self._sized += [vars(kind) for kind in code.classes if id(kind) not in changing]
        self._sizes = [len(owner) for owner in self._sized]
        self._keyed = [
            (owner, own[key], owner.keys() - own[key])
            for key, owner in {id(owner): owner for owner in session.snapshot.owners()}.items()
            if key in own and isinstance(owner, dict) and "__builtins__" not in owner
        ]

    def _written(self, slot: Slot) -> bool:
        """Whether the call writes a place: it itself, or the container that it is in."""
        at: Slot | None = slot
        while at is not None:
            if (id(at.owner), at.key) in self._places or id(at.owner) in self._lists:
                return True
            if at.table or not isinstance(at.owner, (dict, list, deque, tuple)):
                return False
            at = at.parent
        return False

    def pinned(self, slot: Slot) -> Slot:
        """A place, without its path where all on the way there is held by this guard."""
        return slot if any(map(self._written, slot.path())) else slot._replace(parent=None)

    def _index(self) -> None:
        """Order the places by what they are read with: many keys of a container at once, single items, attributes."""
        groups: dict[int, list[Slot]] = {}
        rest: list[Slot] = []
        for slot in self._slots:
            if _getter(slot)[0] is operator.getitem:
                groups.setdefault(id(slot.owner), []).append(slot)
            else:
                rest.append(slot)
        many = [group for group in groups.values() if len(group) > 1]
        single = [group[0] for group in groups.values() if len(group) == 1]
        self._slots = [*(slot for group in many for slot in group), *single, *rest]
        self._many = (
            [operator.itemgetter(*(slot.key for slot in group)) for group in many],
            [group[0].owner for group in many],
        )
        self._items = [slot.owner for slot in single], [slot.key for slot in single]
        self._rest = [_getter(slot)[1] for slot in rest], [_getter(slot)[2] for slot in rest]
        self._expected: list[Any] = [slot.value for slot in self._slots]
        self._tensors = [
            number
            for number, value in enumerate(self._expected)
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        ]

    def _given(self, now: Sequence[Any], arguments: Arguments) -> dict[Path, str]:
        """The arguments that are tensors of the state too, and where they are in it."""
        if not self._tensors:
            return {}
        given = arguments.tensors()
        if {*map(id, map(now.__getitem__, self._tensors))}.isdisjoint(map(id, given.values())):
            return {}
        places = {id(now[number]): self._slots[number].name for number in self._tensors}
        return {path: places[id(each)] for path, each in given.items() if id(each) in places}

    def _follow(self, copies: Mapping[int, Any]) -> None:
        """Watch the containers that took the place of others with the same content."""
        slots = [slot._replace(owner=copies.get(id(slot.owner), slot.owner)) for slot in self._slots]
        self._slots = [slot._replace(value=_held(slot)) for slot in slots]
        self._sized = [copies.get(id(owner), owner) for owner in self._sized]
        self._index()

    def forget(self) -> None:
        """Leave out, from now on, every place that holds something else than at the capture."""
        now = [slot._replace(value=_held(slot)) for slot in self._slots]
        pairs = zip(self._expected, now, strict=True)
        self._slots = [slot for old, slot in pairs if old is slot.value or _stands_in(old, slot.value)]
        self._index()
        self._sized = [owner for owner, size in zip(self._sized, self._sizes, strict=True) if len(owner) == size]
        self._sizes = [len(owner) for owner in self._sized]
        kept = [(owner, content) for owner, content in zip(*self._sets, strict=True) if owner == content]
        self._sets = [owner for owner, _ in kept], [content for _, content in kept]
        self._arrays = [(array, content) for array, content in self._arrays if array.tobytes() == content]

    def differs(self, arguments: Arguments | None = None) -> str | None:
        """The first place that holds something else than at the capture; None if there is none.

        Args:
            arguments: those of the call, of which some may be tensors of the state too.
        """
        try:
            now = [
                *chain.from_iterable(map(operator.call, *self._many)),
                *map(operator.getitem, *self._items),
                *map(getattr, *self._rest),
            ]
        except (KeyError, IndexError, AttributeError, ValueError):
            return "an attribute is gone"
        if not all(map(operator.is_, now, self._expected)):
            copies: dict[int, Any] = {}
            for number, (old, new) in enumerate(zip(self._expected, now, strict=True)):
                if old is not new and not _stands_in(old, new) and not _copied(old, new, copies):
                    return f"{self._slots[number].name} was {_say(old)} and is {_say(new)}"
            if not self._containers.isdisjoint(copies):
                return "a container that the call writes to was replaced"
            if copies:
                self._follow(copies)
            else:
                self._expected = now
        if list(map(len, self._sized)) != self._sizes:
            return "an attribute or item was added or removed"
        if any(owner.keys() - written != keys for owner, written, keys in self._keyed):
            return "an attribute or item was added or removed"
        if arguments is not None and self._given(now, arguments) != self._aliases:
            return "an argument is a tensor that an attribute, global or closure holds, or was one"
        if any(tensor.requires_grad is not required for tensor, required in self._requiring):
            return "a tensor requires gradients or no longer does, and the code asks"
        if [*map(type, self.modules)] != self._kinds:
            return "a module is of another class"
        if any(map(operator.ne, *self._sets)):
            return "a set holds something else"
        if any(array.tobytes() != content for array, content in self._arrays):
            return "an array of numbers holds something else"
        if self._environment is not None and self._environment != _environment():
            return "an environment variable was changed, and the code reads some"
        return None


def _environment() -> dict[Any, Any]:
    return dict(getattr(os.environ, "_data", os.environ))


def _reads_environment(function: FunctionType) -> bool:
    return not {"environ", "getenv"}.isdisjoint(names_of(function))


def _stands_in(old: Any, new: Any) -> bool:
    """Whether a capture made with one value holds with another one."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        # Its content is read anew in each call. A parameter is known by its identity.
        return not isinstance(old, nn.Parameter) and type(old) is type(new) and _like(old, new)
    return alike(old, new)


def _copied(old: Any, new: Any, copies: dict[int, Any]) -> bool:
    """Whether a list or dictionary of plain values was replaced by another one that holds the same.

    Args:
        old, new: the two.
        copies: takes up each container inside of ``old``, and itself, with what replaced it.
    """
    if type(old) is not type(new) or type(old) not in (list, dict):
        return alike(old, new)
    if old is new:
        return True
    if len(old) != len(new) or (isinstance(old, dict) and list(old) != list(new)):
        return False
    if copies.setdefault(id(old), new) is not new:  # two places shared what now are two
        return False
    pairs = zip(old.values(), new.values(), strict=True) if isinstance(old, dict) else zip(old, new, strict=True)
    return all(_copied(one, other, copies) for one, other in pairs)


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same data: -0.0 is not 0.0, nor True 1."""
    return type(one) is type(other) and is_plain(one) and is_plain(other) and repr(one) == repr(other)


def _like(old: torch.Tensor, new: torch.Tensor) -> bool:
    return (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)


def _say(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__.lower()} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if is_plain(value) else f"another {type(value).__name__}"
