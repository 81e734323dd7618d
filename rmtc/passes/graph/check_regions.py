"""Check of a graph: what each operation computes with is, element by element, what it was before a pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from rmtc import heuristics
from rmtc.errors import VerifyError
from rmtc.passes.graph.grains import (
    INDEXED,
    MOVING,
    SAME,
    SHAPED,
    SLICES,
    SPLIT,
    Dim,
    Grains,
    Standing,
    acted_on,
    indexed_dim,
    indices_of,
    pieces_of,
    places_of,
)

aten = torch.ops.aten
_JOINS = frozenset(
    {aten.cat.default, aten.stack.default, aten.select_scatter.default, aten.slice_scatter.default, aten.copy.default}
    | {aten.index_put.default, aten.index_copy.default}
)
"""Operations that put tensors together, which may be of several dtypes."""

_OWN = 44
"""The bits of a number that tell elements from each other. Those above say how an element was cast on its way."""


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

        Only two positions of each grain of a dimension have numbers, see :class:`Grains`. A capture thus makes nothing
        of the size of the model's tensors.

        It shares no code with what finds where elements come from.

        Args:
            graph: the graph of which this is the record, after a pass.

        Raises:
            VerifyError: at the first operation that reads something else, or is another one.
        """
        now, grains, numbers = _calls(graph), Grains(), _Numbers()
        before, after = _Elements(self._calls, grains, numbers), _Elements(now, grains, numbers)
        pairs = list(self._pairs(now, before, after))
        # The grains follow from all that moves elements, so that they are known before the first number is.
        for node, one, two in pairs:
            if not before.meets(one, after, two):
                raise _other(node)
        for node, one, two in pairs:
            if one is two and not isinstance(one.meta["val"], torch.Tensor):
                continue
            if not torch.equal(before.of(one), after.of(two)):
                raise _other(node)

    def _pairs(
        self, now: Mapping[fx.Node, Standing], before: _Elements, after: _Elements
    ) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
        """Yield operations with values that they read before and after, which must be the same."""
        alike = set[fx.Node]()
        for node, call in now.items():
            if (was := self._calls.get(node)) is None:
                if not after.moves(node):
                    raise VerifyError(f"{call.target} is not in the code", location=node.meta.get("location"))
                continue
            (what, old), (other, new) = _taken_apart(node, was), _taken_apart(node, call)
            read = [(before.source(one), after.source(two)) for one, two in zip(old, new, strict=False)]
            others = [(one, two) for one, two in read if one is not two or two not in alike]
            if (what != other or others) and after.moves(node):
                continue  # what reads it is compared
            if what != other:
                raise _other(node)
            yield from ((node, one, two) for one, two in others)
            alike.add(node)


def _other(node: fx.Node) -> VerifyError:
    return VerifyError(f"{node.target} would read other elements than in the code", location=node.meta.get("location"))


def _calls(graph: fx.Graph) -> dict[fx.Node, Standing]:
    return {node: Standing(node.target, node.args, node.kwargs) for node in graph.nodes}


def _taken_apart(node: fx.Node, call: Standing) -> tuple[Any, list[fx.Node]]:
    """Return an operation without the nodes that it reads, and these in order."""
    nodes: list[fx.Node] = []

    def without(value: Any) -> Any:
        if isinstance(value, fx.Node):
            nodes.append(value)
            return fx.Node
        if isinstance(value, (tuple, list)):
            return tuple([without(each) for each in value])
        return value

    if call.target in SHAPED and isinstance(call.args[0], fx.Node):
        return (aten.reshape.default, tuple(node.meta["val"].shape)), [call.args[0]]
    return (call.target, without(call.args), tuple((name, without(call.kwargs[name])) for name in call.kwargs)), nodes


class _Numbers:
    """Numbers of the elements that placeholders, constants and operations make, and of what these are cast to."""

    def __init__(self) -> None:
        self._first: dict[Any, int] = {}
        self._casts: dict[tuple[int, torch.dtype, torch.dtype], int] = {}
        self._next = 0

    def of(self, key: Any, shape: Sequence[int]) -> torch.Tensor:
        """Return the numbers of the elements of a value."""
        count = torch.Size(shape).numel()
        first = self._first.setdefault(key, self._next)
        if first == self._next:
            self._next += count + 1
        return torch.arange(first, first + count, device="cpu").view(tuple(shape))

    def cast(self, numbers: torch.Tensor, dtype: torch.dtype, to: torch.dtype) -> torch.Tensor:
        """Return the numbers of elements that are cast from one dtype to another."""
        before, found = numbers >> _OWN, numbers & ((1 << _OWN) - 1)
        for each in before.unique().tolist():
            now = self._casts.setdefault((each, dtype, to), len(self._casts) + 1)
            found = torch.where(before == each, found | now << _OWN, found)
        return found


class _Elements:
    """The numbers of the elements of the values of a graph.

    Args:
        calls: its operations.
        grains: of the dimensions of its values.
        numbers: of what operations make.
    """

    def __init__(self, calls: Mapping[fx.Node, Standing], grains: Grains, numbers: _Numbers) -> None:
        self._calls, self._grains, self._numbers = calls, grains, numbers
        self._found: dict[fx.Node, Any] = {}
        self._moves: dict[fx.Node, bool] = {}
        self._related: set[fx.Node] = set()
        self._held = 0

    def meets(self, node: fx.Node, others: _Elements, other: fx.Node) -> bool:
        """Relate two values that must be the same, and all that they are made of; returns whether they have one shape.

        Args:
            node: the one.
            others: the values of another graph.
            other: the other one, of that graph.
        """
        self._relate_all(node)
        others._relate_all(other)
        if not all(isinstance(each.meta["val"], torch.Tensor) for each in (node, other)):
            return node is other
        one, two = self._dims(node), others._dims(other)
        if [self._grains.size[dim] for dim in one] != [self._grains.size[dim] for dim in two]:
            return False
        self._grains.join_all(one, two)
        return True

    def of(self, node: fx.Node) -> torch.Tensor:
        """Return the numbers of the elements of a value."""
        while self._held > heuristics.CHECKED_ELEMENTS and self._found:  # the oldest first
            gone = self._found.pop(next(iter(self._found)))
            self._held -= gone.numel() if isinstance(gone, torch.Tensor) else 0
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [each for each in self._read(last) if each not in self._found]
            if last in self._found:
                waiting.pop()
            elif missing:
                waiting += missing
            else:
                self._found[last] = found = self._number(last)
                self._held += found.numel() if isinstance(found, torch.Tensor) else 0
        found = self._found[node]
        assert isinstance(found, torch.Tensor)
        return found

    def source(self, node: fx.Node) -> fx.Node:
        """Return the value that a value is a copy of; else the value."""
        while self._calls[node].target in SAME and self.moves(node):
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
        if target not in MOVING or any(self._constant(each) is None for each in indices_of(call)[1]):
            return False
        if target in INDEXED:
            adds = target is aten.index_put.default and call.given(3, "accumulate", False)
            return indexed_dim(call) is not None and not adds
        if target is aten.dropout.default and args[1] != 0 and args[2]:
            return False
        if target in _JOINS:
            return True
        if not isinstance(args[0], fx.Node) or (target is aten.roll.default and not call.given(2, "dims")):
            return False  # a copy of a number makes an element
        value: Any = node.meta["val"]
        made = value[0] if isinstance(value, (tuple, list)) else value
        return bool(made.dtype == args[0].meta["val"].dtype)

    def _constant(self, node: fx.Node) -> torch.Tensor | None:
        """Return a constant that the code writes as numbers; None for what is computed."""
        dtype, first = node.meta["val"].dtype, node
        while self._calls[first].target in SAME and isinstance(self._calls[first].args[0], fx.Node):
            first = self._calls[first].args[0]
        found = getattr(first.graph.owning_module, str(first.target), None) if first.op == "get_attr" else None
        if not isinstance(found, torch.Tensor) or isinstance(found, FakeTensor):
            return None
        return found.to("cpu", dtype)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """Return the values whose elements an operation moves."""
        call = self._calls[node]
        if not self.moves(node):
            return []
        if call.target in SAME or call.target in SHAPED:
            return [call.args[0]]
        return _taken_apart(node, indices_of(call)[0])[1]

    # Dimensions, and how operations relate them.

    def _dims(self, node: fx.Node, result: int = 0) -> list[Dim]:
        """Return the dimensions of a value."""
        call, moves = self._calls[node], self.moves(node)
        value: Any = node.meta["val"]
        if call.target is operator.getitem and moves:
            return self._dims(call.args[0], call.args[1] % len(call.args[0].meta["val"]))
        if isinstance(value, (tuple, list)):
            value = value[result]
        key = (id(self), node) if moves else self._key(node)
        return self._grains.of(key, value.shape, result)

    def _key(self, node: fx.Node) -> Any:
        """Return what identifies the value of an operation that makes elements, in either graph."""
        call = self._calls[node]
        return node.target if node.op == "get_attr" else call.args if call.target is operator.getitem else node

    def _relate_all(self, node: fx.Node) -> None:
        waiting = [node]
        while waiting:
            last = waiting.pop()
            if last not in self._related:
                self._related.add(last)
                waiting += self._read(last)
                if self.moves(last) and self._calls[last].target is not operator.getitem:
                    value: Any = last.meta["val"]
                    several = len(value) if isinstance(value, (tuple, list)) else 1
                    results = [self._dims(last, at) for at in range(several)]
                    self._grains.relate(self._calls[last], results, [self._dims(each) for each in self._read(last)])

    # Numbers.

    def _shape(self, dims: Sequence[Dim]) -> list[int]:
        return [self._grains.scaled(dim, self._grains.size[dim]) for dim in dims]

    def _number(self, node: fx.Node) -> Any:
        """Return the numbers of the elements of a value, given those that its operation moves."""
        call = target, args, kwargs = self._calls[node]
        if not self.moves(node):
            return self._numbers.of(self._key(node), self._shape(self._dims(node)))
        if target in SAME:
            return self._found[args[0]]
        if target in SHAPED:
            return self._found[args[0]].reshape(self._shape(self._dims(node)))
        if target is aten.expand.default:
            return self._found[args[0]].expand(self._shape(self._dims(node)))
        if target in SPLIT:
            whole = self._dims(args[0])
            dim = acted_on(call, len(whole))
            given, pieces = self._found[args[0]], []
            for place in pieces_of(call, self._grains.size[whole[dim]], node.meta["val"], dim):
                start, count = (self._grains.scaled(whole[dim], each) for each in (place.start, len(place)))
                pieces.append(given.narrow(dim, start, count))
            return pieces

        def number(each: fx.Node) -> Any:
            dtype, to = (one.meta["val"].dtype if target in _JOINS else torch.int64 for one in (each, node))
            return self._found[each] if dtype == to else self._numbers.cast(self._found[each], dtype, to)

        if target in INDEXED:
            at = 1 if target in (aten.index.Tensor, aten.index_put.default) else 2
            args = (*args[:at], fx.map_arg(args[at], self._constant), *args[at + 1 :])
        given, named = fx.map_arg((args, dict(kwargs)), number)
        if target in SLICES:
            whole = self._dims(args[0])
            dim = acted_on(call, len(whole))
            places = places_of(call, self._grains.size[whole[dim]])
            start = self._grains.scaled(whole[dim], places.start)
            bounds = start, start + self._grains.scaled(whole[dim], len(places)), 1
            if places.step != 1:
                bounds = places.start, places.stop, places.step
            if target is not aten.slice_scatter.default:
                return aten.slice.Tensor(given[0], dim, *bounds)
            return aten.slice_scatter.default(given[0], given[1], dim, *bounds)
        if target is aten.roll.default:
            dims = call.given(2, "dims")
            whole = self._dims(node)
            shifts = [self._grains.scaled(whole[dim], shift) for dim, shift in zip(dims, args[1], strict=True)]
            return given[0].roll(shifts, dims)
        if target is aten.copy.default:
            return given[1].expand(self._shape(self._dims(node)))
        return target(*given, **named)
