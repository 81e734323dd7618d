"""Equivalence classes of cells: the same operations, constants and wiring, relative to the layer."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from rmtc.affine import Affine, solved
from rmtc.ir.formula import layers_away, segments_before
from rmtc.ir.program import Form, Op, Src, form_text, leaves, map_leaves
from rmtc.ir.segment_loop import Item, Outer, Row, SegmentLoop
from rmtc.passes.fold.run import nesting
from rmtc.passes.fold.streams import Family

__all__ = ["Namer", "in_row"]


@dataclass
class _Class:
    name: str
    ops: Sequence[Op]
    slots: list[list[_Slot]]
    note: str


class Namer:
    """Finds the class of each cell: an equivalent one seen before, or a new one."""

    def __init__(self, loop: SegmentLoop, family: Family | None) -> None:
        self._loop, self._family = loop, family
        self._rows = [*loop.rows, loop.steady]
        self._classes: dict[str, list[_Class]] = {"C": [], "P": [], "E": []}
        self._known: dict[Any, int] = {}
        self._made = functools.cache(self._find_made)

    @property
    def notes(self) -> dict[str, str]:
        """The difference of each class from the one it resembles."""
        return {each.name: each.note for some in self._classes.values() for each in some if each.note}

    def classify(self, row: int, layer: int) -> str:
        """Return the class of a cell, of a prologue (layer -1) or an epilogue (layer L); empty if it has no operations.

        Steady cells must come first.
        """
        ops = self._rows[row][slice(*self._loop.layouts[row].bounds(layer))]
        if not ops:
            return ""
        slots = [[self._slot(leaf, row, layer) for leaf in leaves(op.args)] for op in ops]
        letter = "P" if layer < 0 else "C" if layer < self._loop.layers else "E"
        classes = self._classes[letter]
        unlike = [(-1, "")]
        for each in classes:
            merged, why = _merge(each, ops, slots)
            if not why:
                each.slots = merged
                return each.name
            unlike.append((len(merged), f"unlike {each.name}: {why}"))
        _, note = max(unlike, key=operator.itemgetter(0))
        classes.append(_Class(f"{letter}{len(classes)}", ops, slots, note))
        return classes[-1].name

    def _slot(self, leaf: Any, row: int, layer: int) -> _Slot:
        both = (("fixed", None), ("relative", layer))
        match leaf:
            case Row():
                return self._operand(leaf, row, layer)
            case Src(name):
                source = self._loop.sources[name]
                ways = {(kind, self._name(each, at)) for each in source.names for kind, at in both}
                return _Operand(frozenset(ways), (tuple(source.shape), source.dtype), given="source")
            case Outer(_, number):
                made = {(kind, str(self._made(leaf, at))) for kind, at in both}
                return _Operand(frozenset(made), self._loop.before[number].form, given="before")
            case Item(name, _, rest):
                return _Operand(frozenset([("itself", f"{name}[s]{rest}")]), given="item")
            case Affine() | int() | float() if type(leaf) in (Affine, int, float):
                first = row < len(self._loop.rows)
                sizes = {"s": row, "T": self._loop.segment_length} if first else {}
                return _Constant({layer: in_row(leaf, sizes)}, sizes)
        return _Operand(frozenset([("itself", repr(leaf))]))

    def _name(self, name: str, layer: int | None) -> str:
        """Return a name relative to a layer: ``layers.{l}.weight`` is its own, ``{l+1}`` the next one's."""
        own, of = self._family.place(name) if self._family is not None else (name, None)
        if of is None or layer is None:
            return name
        return own if of == layer else own.replace("{l", f"{{l{of - layer:+}")

    def _find_made(self, leaf: Src | Outer, layer: int | None) -> str | int:
        """Name a tensor, or number a value from before the loop by what it is made of, relative to a layer."""
        if isinstance(leaf, Src):
            return self._name(leaf.name, layer)
        op = self._loop.before[leaf.number]
        args = map_leaves(op.args, lambda arg: self._made(arg, layer) if isinstance(arg, (Src, Outer)) else str(arg))
        if op.target is torch.ops.aten.select.int and type(op.args[0]) is Src and op.args[1] == 0:
            args = (self._name(f"{op.args[0].name}[{op.args[2]}]", layer),)
        return self._known.setdefault((op.target, args), len(self._known))

    def _operand(self, leaf: Row, row: int, layer: int) -> _Operand:
        made = row - leaf.back
        layout = self._loop.layouts[made]
        at = layout.layer_of(leaf.number)
        number = leaf.number - layout.bounds(at)[0]
        if at == layer and leaf.back == 0:
            return _Operand(frozenset([("itself", f"value {number} of its own")]))
        if 0 <= at < self._loop.layers:
            relative = layers_away(layer - at) if at != layer else "its layer"
            ways = frozenset([("relative", relative), ("fixed", f"layer {at}")])
        else:
            ways = frozenset([("itself", f"the {'prologue' if at < 0 else 'epilogue'}")])
        # What makes it has another number in another class of cells.
        form, edge = self._rows[made][leaf.number].form, layer == 0 and at < 0
        return _Operand(ways, form, leaf.back, {(made, at): number}, edge)


class _Operand(NamedTuple):
    """An operand, or a constant that is no number.

    Attributes:
        ways: the ways to say which it is, ``fixed`` or ``relative`` to the layer, or ``itself`` if both are the same.
            Those stay that hold for all members.
        form: its shape and dtype.
        back: how many segments back it is made.
        number: the operation in its part, for each row and layer of a producer.
        edge: whether the first layer reads from the prologue what the others may read from the layer below.
        given: ``source``, ``item`` or ``before`` of one that is there before the loop, else empty.
    """

    ways: frozenset[tuple[str, str]]
    form: Form | None = None
    back: int = 0
    number: Mapping[tuple[int, int], int] = MappingProxyType({})
    edge: bool = False
    given: str = ""

    def merge(self, other: _Operand) -> _Operand | None:
        """Return this operand of a class with that of another member; None if they differ."""
        if None not in (self.form, other.form) and self.form != other.form:
            return None
        ways = self.ways & other.ways
        if ways and (self.given, self.back) == (other.given, other.back):
            number = {**self.number, **other.number}
            alike = all(number[made] == at for made, at in self.number.items())
            return self._replace(ways=ways, number=number, edge=self.edge and other.edge) if alike else None
        for mine, its in ((self, other), (other, self)):
            below = any(kind == "relative" and name.endswith("below") for kind, name in mine.ways)
            # A value from before the loop stands in for that of a segment before the first.
            if (its.given and mine.back) or (its.edge and its.back == mine.back and below):
                return mine
        return None

    def text(self, beside: _Slot) -> str:
        """Name it, in the way in which another one is named."""
        kinds, others = ({kind for kind, _ in each.ways} for each in (self, beside))
        kind = max(kinds & others or kinds)
        names = ", ".join(sorted(name for of, name in self.ways if of == kind))
        before = f", {segments_before(self.back)}" if self.back else ""
        return f"{self.given} {names}".lstrip() + before


class _Constant(NamedTuple):
    """A number: the same in all cells, a function of the segment, or given by the layer.

    Floats may differ from layer to layer in any way; integers must advance evenly, as the slices of a tensor that holds
    all layers do.

    Attributes:
        by_layer: the number in each layer that has members, in steady segments if these are.
        sizes: the segment and its length, in a first segment, which is a whole one.
        ways: none: a number is not named otherwise than it is.
    """

    by_layer: dict[int, Any]
    sizes: dict[str, int]
    ways: frozenset[tuple[str, str]] = frozenset()

    def merge(self, other: _Constant) -> _Constant | None:
        ((layer, number),) = other.by_layer.items()
        if layer in self.by_layer:  # a steady segment's function must give this segment's number
            return self if in_row(self.by_layer[layer], other.sizes) == number else None
        by_layer = {**self.by_layer, layer: number}
        if len(set(by_layer.values())) > 1:
            kinds = set(map(type, by_layer.values()))
            line = [(at, 1, each) for at, each in (*itertools.islice(self.by_layer.items(), 2), (layer, number))]
            if kinds != {float} and (kinds != {int} or solved(line) is None):
                return None
        return self._replace(by_layer=by_layer)

    def text(self, _: _Slot) -> str:
        return " or ".join(dict.fromkeys(map(str, self.by_layer.values())))


_Slot: TypeAlias = _Operand | _Constant


def in_row(number: Any, sizes: Mapping[str, int]) -> Any:
    """Return a number for sizes of a row, and anything else as it is."""
    return number.fix(**sizes) if isinstance(number, Affine) else number


def _merge(known: _Class, ops: Sequence[Op], slots: list[list[_Slot]]) -> tuple[list[list[_Slot]], str]:
    """Merge the slots of a class with those of another member.

    Returns:
        The slots of the operations that fit, and why the next one does not; empty if all do.
    """
    merged: list[list[_Slot]] = []
    for op, other, own, theirs in zip(ops, known.ops, slots, known.slots, strict=False):
        if op.target is not other.target or nesting(op.args) != nesting(other.args):
            more = len(ops) - len(known.ops)
            than = f"{abs(more)} operations {'more' if more > 0 else 'fewer'}, the first difference is "
            return merged, f"{than if more else ''}{_at(op)} in place of {_at(other)}"
        if op.form is not None and other.form is not None and op.form != other.form:
            return merged, f"{_at(op)} makes {form_text(op.form)}, not {form_text(other.form)}"
        row: list[_Slot] = []
        for a, b in zip(own, theirs, strict=True):
            both = b if a == b else b.merge(a) if type(a) is type(b) else None  # type: ignore[arg-type]
            if both is None:
                return merged, f"{_at(op)} reads {_unlike(a, b)}"
            row.append(both)
        merged.append(row)
    if len(ops) != len(known.ops):
        return merged, f"{len(ops)} operations, not {len(known.ops)}"
    return merged, ""


def _at(op: Op) -> str:
    return op.label + (f" at {op.location._replace(function='')}" if op.location is not None else "")


def _unlike(a: _Slot, b: _Slot) -> str:
    """Name two slots in words that differ."""
    one, other = a.text(b), b.text(b)
    if one == other and isinstance(a, _Operand) and isinstance(b, _Operand):
        made = next((made for made, at in a.number.items() if b.number.get(made, at) != at), None)
        if made is not None:
            one, other = (f"value {each.number[made]} of {one}" for each in (a, b))
        elif a.form is not None and b.form is not None:
            one, other = f"{one}, {form_text(a.form)}", form_text(b.form)
    return f"{one}, not {other}"
