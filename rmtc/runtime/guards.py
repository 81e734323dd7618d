"""Guards: what a compiled call was captured under, and whether a later call is made under the same."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._device import DeviceContext

from rmtc.capture.arguments import Arguments, Path, show
from rmtc.capture.effects import Effect
from rmtc.capture.probe import Plan, Sizes
from rmtc.capture.session import Session
from rmtc.capture.state import Slot, is_plain, named_functions

__all__ = ["ArgumentGuard", "StateGuard", "hooked", "modes"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
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
    general = torch.nn.modules.module
    if general._global_forward_hooks or general._global_forward_pre_hooks:
        return "there are global forward hooks (torch.nn.modules.module)"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active (TorchDispatchMode)"
    if torch._C._len_torch_function_stack() and any(
        not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a function mode is active (TorchFunctionMode)"
    if any(map(len, tables)):
        for number, table in enumerate(tables):
            for hook in table.values():
                if getattr(hook, "__module__", None) != _CAPTURING:
                    name = type(modules[number // len(_HOOKS)]).__name__
                    return f"there is a hook on a submodule ({name}), which would not be called"
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

    def __str__(self) -> str:
        sizes = ["any" if size < 0 else str(size) for size in self.shape]
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(sizes)}] on {self.device}"


class ArgumentGuard:
    """The structure of a call's arguments, and the sizes of a later call with it."""

    def __init__(self, arguments: Arguments, plan: Plan) -> None:
        self._plan = plan
        self._dims: dict[Path, tuple[int, ...]] = {}
        for path, dim in plan.growth.dims:
            self._dims[path] = (*self._dims.get(path, ()), dim)
        self._leaves = {path: self._describe(path, leaf) for path, leaf in self._given(arguments).items()}

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
        return _Given(type(leaf), leaf.dtype, leaf.device, leaf.layout, shape)

    @staticmethod
    def _alike(one: Any, other: Any) -> bool:
        if one is other:
            return True
        plain = isinstance(one, _Given) or is_plain(one)
        return type(one) is type(other) and plain and bool(one == other)


def _getter(slot: Slot) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    if isinstance(slot.owner, (dict, list, deque, tuple)):
        return operator.getitem, slot.owner, slot.key
    return getattr, slot.owner, str(slot.key) if not isinstance(slot.owner, CellType) else "cell_contents"


class StateGuard:
    """Everything in Python that a capture could see: attributes, globals, closures, by identity.

    Args:
        session: the capture's.
        effects: the places that the call itself writes, which are left out here.
    """

    def __init__(self, session: Session, effects: Sequence[Effect]) -> None:
        written = [effect.slot.name for effect in effects if not effect.whole]
        written += [effect.slot.name.rpartition("[")[0] for effect in effects if effect.whole]
        slots = [slot for slot in session.snapshot.slots if not _below(slot.name, written)]
        self._slots = [slot for slot in slots if slot.key not in _BOOKKEEPING and not isinstance(slot.owner, tuple)]
        for name, space, value in named_functions(session.roots):
            self._slots.append(Slot(name, space, name, value))
        getters = [_getter(slot) for slot in self._slots]
        items = [number for number, (get, *_) in enumerate(getters) if get is operator.getitem]
        rest = [number for number, (get, *_) in enumerate(getters) if get is not operator.getitem]
        self._slots = [self._slots[number] for number in (*items, *rest)]
        self._items = [getters[number][1] for number in items], [getters[number][2] for number in items]
        self._rest = [getters[number][1] for number in rest], [getters[number][2] for number in rest]
        self._expected: list[Any] = [slot.value for slot in self._slots]
        changing = {id(effect.slot.owner) for effect in effects}
        # Tables of hooks have a check of their own.
        changing |= {id(vars(module)[key]) for module in session.all_modules() for key in _BOOKKEEPING}
        self._sized = [
            owner
            for owner in {id(owner): owner for owner in session.snapshot.owners()}.values()
            if isinstance(owner, (dict, list, deque)) and id(owner) not in changing and "__builtins__" not in owner
        ]
        self._sizes = [len(owner) for owner in self._sized]
        classes = {type(module): None for module in session.all_modules()}
        self._forwards = [(kind, kind.forward) for kind in classes]

    def differs(self) -> str | None:
        """The first place that holds something else than at the capture; None if there is none."""
        try:
            now = [*map(operator.getitem, *self._items), *map(getattr, *self._rest)]
        except (KeyError, IndexError, AttributeError, ValueError):
            return "an attribute is gone"
        if not all(map(operator.is_, now, self._expected)):
            for number, (old, new) in enumerate(zip(self._expected, now, strict=True)):
                if old is not new and not _stands_in(old, new):
                    return f"{self._slots[number].name} was {_say(old)} and is {_say(new)}"
            self._expected = now
        if list(map(len, self._sized)) != self._sizes:
            return "an attribute or item was added or removed"
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return f"{kind.__qualname__}.forward is another function"
        return None


def _below(name: str, places: Sequence[str]) -> bool:
    return any(name == place or (name.startswith(place) and name[len(place)] in ".[") for place in places)


def _stands_in(old: Any, new: Any) -> bool:
    """Whether a capture made with one value holds with another one."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        # Its content is read anew in each call. A parameter is known by its identity.
        return not isinstance(old, nn.Parameter) and type(old) is type(new) and _like(old, new)
    return type(old) is type(new) and is_plain(old) and bool(old == new)


def _like(old: torch.Tensor, new: torch.Tensor) -> bool:
    return (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)


def _say(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__.lower()} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if is_plain(value) else f"another {type(value).__name__}"
