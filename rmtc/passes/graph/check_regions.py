"""Check of a graph: what each operation computes with is, element by element, what it was before a pass."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc import heuristics
from rmtc.errors import VerifyError

aten = torch.ops.aten
_SAME = frozenset(
    {aten.clone.default, aten._to_copy.default, aten.type_as.default, aten.detach.default, aten.alias.default}
    | {aten.contiguous.default, aten.lift_fresh_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout}
    | {aten.to.other, aten.dropout.default}
)
"""Operations whose result is their operand, if they neither change its dtype nor drop anything."""

_SHAPED = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
    | {aten.view_as.default, aten.reshape_as.default}
)
"""Operations whose result has the elements of their operand in the same order, in another shape."""

_JOINS = frozenset(
    {aten.cat.default, aten.stack.default, aten.select_scatter.default, aten.slice_scatter.default, aten.copy.default}
    | {aten.index_put.default, aten.index_copy.default}
)
"""Operations that put tensors together, which may be of several dtypes."""

_INDEXED = (aten.index.Tensor, aten.index_select.default)
_MOVING = (aten.roll.default, aten.flip.default, aten.tensor_split.sections, aten.tensor_split.indices)
"""Operations besides views that move elements of one tensor."""

_COMPUTING = frozenset(
    {aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype, aten.conj.default, aten._conj.default}
    | {aten._neg_view.default}
)
"""Views that compute something."""

_CAST = -1
"""The number of an element that was cast on its way into a tensor."""


class _Standing(NamedTuple):
    """An operation as it stands in a graph."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class GraphReads:
    """A record of what each operation of a graph reads.

    Args:
        graph: the graph, which may change later.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._calls = _calls(graph)

    def check(self, graph: fx.Graph) -> None:
        """Check that each operation of a graph reads what it did, and that the results are the same.

        Elements have numbers, which the operations that only move them move. An operation that computes makes new ones.
        They are the same in both graphs, for it is checked that it reads the same in both::

            before:  %p = split(%x, 4, 1); %a = getitem(%p, 1); sin(%a)
            after:   %a = slice(%x, 1, 4, 8); sin(%a)                      both read elements 4 to 8 of %x

        It shares no code with what finds where elements come from.

        Args:
            graph: the graph of which this is the record, after a pass.

        Raises:
            VerifyError: at the first operation that reads something else, or is another one.
        """
        now, numbers = _calls(graph), _Numbers()
        before, after = _Elements(self._calls, numbers), _Elements(now, numbers)
        alike = set[fx.Node]()
        for node, call in now.items():
            if (was := self._calls.get(node)) is None:
                if not after.moves(node):
                    raise VerifyError(f"{call.target} is not in the code", location=node.meta.get("location"))
                continue
            (what, old), (other, new) = _taken_apart(node, was), _taken_apart(node, call)
            pairs = [(before.source(one), after.source(two)) for one, two in zip(old, new, strict=False)]
            same = what == other and all(one is two and two in alike for one, two in pairs)
            if not same and after.moves(node):
                continue  # what reads it is compared
            if what != other or not all(
                (one is two and two in alike) or torch.equal(before.of(one), after.of(two)) for one, two in pairs
            ):
                raise VerifyError(
                    f"{call.target} would read other elements than in the code", location=node.meta.get("location")
                )
            alike.add(node)


def _calls(graph: fx.Graph) -> dict[fx.Node, _Standing]:
    return {node: _Standing(node.target, node.args, node.kwargs) for node in graph.nodes}


def _taken_apart(node: fx.Node, call: _Standing) -> tuple[Any, list[fx.Node]]:
    """Return an operation without the nodes that it reads, and these in order."""
    nodes: list[fx.Node] = []

    def without(value: Any) -> Any:
        if isinstance(value, fx.Node):
            nodes.append(value)
            return fx.Node
        if isinstance(value, (tuple, list)):
            return tuple([without(each) for each in value])
        return value

    if call.target in _SHAPED:
        return (aten.reshape.default, tuple(node.meta["val"].shape)), [call.args[0]]
    return (call.target, without(call.args), tuple((name, without(call.kwargs[name])) for name in call.kwargs)), nodes


class _Numbers:
    """Numbers of the elements that placeholders, constants and operations make."""

    def __init__(self) -> None:
        self._first: dict[Any, int] = {}
        self._next = 0

    def of(self, key: Any, value: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the elements of a value."""
        first = self._first.setdefault(key, self._next)
        if first == self._next:
            self._next += value.numel() + 1
        return torch.arange(first, first + value.numel()).view(value.shape)


class _Elements:
    """The numbers of the elements of the values of a graph.

    Args:
        calls: its operations.
        numbers: of what operations make.
    """

    def __init__(self, calls: Mapping[fx.Node, _Standing], numbers: _Numbers) -> None:
        self._calls, self._numbers = calls, numbers
        self._found: dict[fx.Node, Any] = {}
        self._moves: dict[fx.Node, bool] = {}
        self._held = 0

    def of(self, node: fx.Node) -> torch.Tensor:
        """Return the numbers of the elements of a value."""
        if self._held > heuristics.CHECKED_ELEMENTS:
            self._found.clear()
            self._held = 0
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [each for each in self._read(last) if each not in self._found]
            waiting += missing
            if not missing:
                self._found[waiting.pop()] = found = self._number(last)
                self._held += found.numel() if isinstance(found, torch.Tensor) else 0
        found = self._found[node]
        assert isinstance(found, torch.Tensor)
        return found

    def source(self, node: fx.Node) -> fx.Node:
        """Return the value that a value is a copy of; else the value."""
        while self._calls[node].target in _SAME and self.moves(node):
            node = self._calls[node].args[0]
        return node

    def moves(self, node: fx.Node) -> bool:
        """Tell whether an operation only moves elements."""
        if node not in self._moves:
            self._moves[node] = self._only_moves(node)
        return self._moves[node]

    def _only_moves(self, node: fx.Node) -> bool:
        call = target, args, _ = self._calls[node]
        if node.op != "call_function" or not args:
            return False
        if target is operator.getitem:
            return self.moves(args[0])
        adds = target is aten.index_put.default and len(args) > 3
        drops = target is aten.dropout.default and args[1] != 0 and args[2]
        if adds or drops or any(self._constant(each) is None for each in _indices(call)):
            return False
        if target in _JOINS or target in _INDEXED:
            return True
        views = isinstance(target, torch._ops.OpOverload) and target.is_view and target not in _COMPUTING
        if not (views and len(_taken_apart(node, call)[1]) == 1) and target not in (*_SAME, *_SHAPED, *_MOVING):
            return False
        value: Any = node.meta["val"]
        made = value[0] if isinstance(value, (tuple, list)) else value
        return bool(made.dtype == args[0].meta["val"].dtype)

    def _constant(self, node: fx.Node) -> torch.Tensor | None:
        """Return a constant that the code writes as numbers; None for what is computed."""
        while self._calls[node].target in _SAME:
            node = self._calls[node].args[0]
        found = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
        return found.cpu() if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor) else None

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """Return the values whose elements an operation moves."""
        call = self._calls[node]
        if not self.moves(node):
            return []
        if call.target in _SAME or call.target in _SHAPED:
            return [call.args[0]]
        indices = _indices(call)
        return [each for each in _taken_apart(node, call)[1] if each not in indices]

    def _number(self, node: fx.Node) -> Any:
        """Return the numbers of the elements of a value, given those that its operation moves."""
        call = target, args, kwargs = self._calls[node]
        value: Any = node.meta["val"]
        if not self.moves(node):
            key: Any = node.target if node.op == "get_attr" else args if target is operator.getitem else node
            return self._numbers.of(key, value)
        if target in _SAME:
            return self._found[args[0]]
        if target in _SHAPED:
            return self._found[args[0]].reshape(value.shape)
        indices, casts = _indices(call), False

        def number(each: fx.Node) -> Any:
            nonlocal casts
            if each in indices:
                return self._constant(each)
            found = self._found[each]
            if target not in _JOINS or each.meta["val"].dtype == value.dtype:
                return found
            casts = True
            return torch.full_like(found, _CAST)

        given, named = fx.map_arg((args, dict(kwargs)), number)
        found = given[1].expand(value.shape) if target is aten.copy.default else target(*given, **named)
        return torch.where(found == _CAST, self._numbers.of(node, value), found) if casts else found


def _indices(call: _Standing) -> list[Any]:
    """Return the tensors that tell an operation which elements it moves."""
    if call.target in (aten.index.Tensor, aten.index_put.default):
        return [each for each in call.args[1] if each is not None]
    return [call.args[2]] if call.target in (aten.index_select.default, aten.index_copy.default) else []
