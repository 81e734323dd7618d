"""Equivalence classes of cells: the same operations, constants and wiring, relative to the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rmtc.affine import Affine
from rmtc.ir.program import Form, Op, Source, Src, leaves, map_leaves, target_name
from rmtc.ir.segment_loop import Item, Outer, Row, SegmentLoop
from rmtc.passes.fold.run import nesting
from rmtc.passes.fold.streams import Family

__all__ = ["Namer"]

_LETTERS = {"layer": "C", "prologue": "P", "epilogue": "E"}


@dataclass
class _Class:
    name: str
    stage: str
    ops: Sequence[Op]
    slots: list[Any]
    note: str = ""


class Namer:
    """Finds the class of each cell: an equivalent one seen before, or a new one."""

    def __init__(self, loop: SegmentLoop, family: Family | None) -> None:
        self._loop, self._family = loop, family
        self._rows = [*loop.rows, loop.steady]
        self.classes: list[_Class] = []
        self._made: dict[tuple[int, int | None], int] = {}
        self._known: dict[Any, int] = {}

    def classify(self, stage: str, row: int, layer: int) -> str:
        start, end = self._loop.layouts[row].bounds(layer)
        ops = self._rows[row][start:end]
        if not ops:
            return ""
        slots = [self._slots(op, row, layer, start) for op in ops]
        differs, shared = "", -1
        for each in self.classes:
            if each.stage != stage:
                continue
            merged, same, why = _merge(each, ops, slots)
            if merged is not None:
                each.slots = merged
                return each.name
            if same > shared:
                differs, shared = f"unlike {each.name}: {why}", same
        count = sum(1 for each in self.classes if each.stage == stage)
        name = f"{_LETTERS[stage]}{count}"
        self.classes.append(_Class(name, stage, ops, slots, differs))
        return name

    def _slots(self, op: Op, row: int, layer: int, start: int) -> list[Any]:
        out: list[Any] = []
        for leaf in leaves(op.args):
            if isinstance(leaf, Row):
                out.append(self._operand(leaf, row, layer, start))
            elif type(leaf) is Src:
                source: Source = self._loop.sources[leaf.name]
                names = [self._name(name, at) for name in source.names for at in (None, layer)]
                form = (tuple(source.shape), source.dtype)
                out.append(_Operand("source", frozenset(names), form))
            elif isinstance(leaf, Item):
                out.append(_Operand("item", frozenset([f"{leaf.list}[s]{leaf.rest}"])))
            elif isinstance(leaf, Outer) and leaf.part == "before":
                made = frozenset(self._outer(leaf.number, at) for at in (None, layer))
                out.append(_Operand("before", made, self._loop.before[leaf.number].form))
            elif type(leaf) in (int, float) or isinstance(leaf, Affine):
                constant = None if isinstance(leaf, Affine) else leaf
                out.append(_Constant({(row, layer): leaf}, self._loop.segment_length, len(self._loop.rows), constant))
            else:
                out.append((type(leaf), leaf))
        return out

    def _name(self, name: str, layer: int | None) -> str:
        """Return a name relative to a layer: ``layers.{l}.weight`` is its own, ``{l+1}`` the next one's."""
        own, of = self._family.place(name) if self._family is not None else (name, None)
        if of is None or layer is None:
            return name
        return own if of == layer else own.replace("{l", f"{{l{of - layer:+}")

    def _outer(self, number: int, layer: int | None) -> int:
        """Number a value from before the loop by what it is made of, relative to a layer."""
        if (number, layer) not in self._made:
            op = self._loop.before[number]

            def part(arg: Any) -> Any:
                if isinstance(arg, Outer):
                    return self._outer(arg.number, layer)
                return self._name(arg.name, layer) if type(arg) is Src else str(arg)

            args = map_leaves(op.args, part)
            if target_name(op.target) == "select.int" and type(op.args[0]) is Src and op.args[1] == 0:
                args = (self._name(f"{op.args[0].name}[{op.args[2]}]", layer),)
            self._made[number, layer] = self._known.setdefault((op.target, args), len(self._known))
        return self._made[number, layer]

    def _operand(self, leaf: Row, row: int, layer: int, start: int) -> Any:
        made = max(0, row - leaf.back)
        layout = self._loop.layout(made) if leaf.back else self._loop.layouts[row]
        at = layout.layer_of(leaf.number)
        if at == layer and leaf.back == 0:
            return ("local", leaf.number - start)
        # What makes it has another number in another class of cells.
        maker = min(made, len(self._loop.rows))
        number, form = {(maker, at): leaf.number - layout.bounds(at)[0]}, self._rows[maker][leaf.number].form
        if at < 0 or at >= len(layout.layers):
            kind = "prologue" if at < 0 else "epilogue"
            return _Operand(kind, frozenset([kind]), form, leaf.back, number, edge=layer == 0 and at < 0)
        return _Operand("cell", frozenset({("relative", layer - at), ("layer", at)}), form, leaf.back, number)


@dataclass(frozen=True)
class _Operand:
    """An operand that is not made in its cell.

    Attributes:
        kind: ``source``, ``item`` or ``before`` of one that is there before the loop, else the part that makes it:
            ``cell``, ``prologue`` or ``epilogue``.
        ways: the ways to say which it is, of which those stay that hold for all members.
        form: its shape and dtype.
        back: how many segments back it is made.
        number: the operation in its part, for each row and layer of a producer.
        edge: whether the first layer reads from the prologue what the others may read from the layer below.
    """

    kind: str
    ways: frozenset[Any]
    form: Form | None = None
    back: int = 0
    number: Mapping[tuple[int, int], int] = field(default_factory=dict)
    edge: bool = False

    def merge(self, other: _Operand) -> _Operand | None:
        """Return this operand of a class with that of another member; None if they differ."""
        if None not in (self.form, other.form) and self.form != other.form:
            return None
        if (self.kind, self.back) == (other.kind, other.back):
            ways, number = self.ways & other.ways, {**self.number, **other.number}
            alike = ways and all(number[made] == at for made, at in self.number.items())
            return replace(self, ways=ways, number=number, edge=self.edge and other.edge) if alike else None
        for mine, given in ((self, other), (other, self)):
            if given.edge and mine.kind == "cell" and given.back == mine.back:
                return mine if any(way == "relative" and layer > 0 for way, layer in mine.ways) else None
            # A value from before the loop stands in for that of a segment before the first.
            if mine.back > 0 and given.kind in _GIVEN:
                return mine
        return None


_GIVEN = ("source", "item", "before")


@dataclass(frozen=True)
class _Constant:
    """A number: the same in all cells, a function of the segment, or given by the layer.

    A class keeps the numbers of all its members. Floats may differ from layer to layer in any way; integers must
    advance evenly, as the slices of a tensor that holds all layers do.
    """

    values: dict[tuple[int, int], int | float | Affine]
    segment_length: int
    steady: int
    constant: int | float | None = None  # what all members have

    def merge(self, other: _Constant) -> _Constant | None:
        values = {**self.values, **other.values}
        if self.constant is not None and (type(self.constant), self.constant) == (type(other.constant), other.constant):
            return replace(self, values=values)
        functions = {layer: value for (row, layer), value in values.items() if row == self.steady}
        by_layer: dict[int, set[Any]] = {}
        for (row, layer), value in values.items():
            function = functions.get(layer, value)
            # A steady segment's function must give this segment's number.
            if row != self.steady and self._in_row(function, row) != self._in_row(value, row):
                return None
            by_layer.setdefault(layer, set()).add(functions.get(layer, self._in_row(value, row)))
        if any(len(found) > 1 for found in by_layer.values()):
            return None
        layers = sorted(by_layer)
        numbers = [next(iter(by_layer[layer])) for layer in layers]
        if len(set(numbers)) > 1 and not all(type(number) is float for number in numbers):
            if any(type(number) is not int for number in numbers):
                return None
            rise, run = numbers[1] - numbers[0], layers[1] - layers[0]
            points = zip(layers, numbers, strict=True)
            if any((number - numbers[0]) * run != rise * (layer - layers[0]) for layer, number in points):
                return None
        return replace(self, values=values, constant=None)

    def _in_row(self, number: int | float | Affine, row: int) -> int | float | Affine:
        """Return a number in a row of first segments, which are whole ones."""
        if isinstance(number, Affine) and row != self.steady:
            return number.fix(s=row, T=self.segment_length)
        return number

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(str(value) for value in self.values.values()))


def _merge(known: _Class, ops: Sequence[Op], slots: list[Any]) -> tuple[list[Any] | None, int, str]:
    """Merge the slots of a class with those of another member.

    Returns:
        The slots, or None; how many operations fit; why the next one does not.
    """
    merged: list[Any] = []
    for number, (op, other) in enumerate(zip(ops, known.ops, strict=False)):
        if op.target is not other.target or nesting(op.args) != nesting(other.args):
            more = len(ops) - len(known.ops)
            count = (
                f"{abs(more)} operations {'more' if more > 0 else 'fewer'}, the first difference is " if more else ""
            )
            return None, number, f"{count}{_at(op)} in place of {_at(other)}"
        if op.form is not None and other.form is not None and op.form != other.form:
            return None, number, f"{_at(op)} makes {_form(op.form)}, not {_form(other.form)}"
        row: list[Any] = []
        for a, b in zip(slots[number], known.slots[number], strict=True):
            row.append(_merge_slot(b, a))
            if row[-1] is None:
                return None, number, f"{_at(op)} reads {_unlike(a, b)}"
        merged.append(row)
    if len(ops) != len(known.ops):
        return None, len(merged), f"{len(ops)} operations, not {len(known.ops)}"
    return merged, len(merged), ""


def _form(form: Form) -> str:
    return f"{str(form[1]).removeprefix('torch.')}{list(form[0])}"


def _at(op: Op) -> str:
    place = op.location
    return target_name(op.target) + (f" at {place.file}:{place.line}" if place is not None else "")


def _merge_slot(known: Any, other: Any) -> Any:
    """Return the slot of a class with another member; None if they differ."""
    if type(known) is type(other) and isinstance(known, (_Constant, _Operand)):
        return known.merge(other)
    return known if known == other else None


def _unlike(a: Any, b: Any) -> str:
    """Name two slots in words that differ."""
    one, other = _say(a), _say(b)
    if isinstance(a, _Operand) and isinstance(b, _Operand):
        if a.kind == b.kind == "cell":
            kind = max({kind for kind, _ in a.ways} & {kind for kind, _ in b.ways})
            one, other = (f"{_producer(each, kind)}{_before(each.back)}" for each in (a, b))
        made = next((made for made in a.number if b.number.get(made, a.number[made]) != a.number[made]), None)
        if one == other and made is not None:
            one, other = (f"value {each.number[made]} of {text}" for each, text in ((a, one), (b, other)))
        if one == other and a.form is not None and b.form is not None:
            return f"{one}, {_form(a.form)}, not {_form(b.form)}"
    return f"{one}, not {other}"


def _say(slot: Any) -> str:
    if isinstance(slot, _Operand):
        if slot.kind == "cell":
            return f"{_producer(slot, max(slot.ways)[0])}{_before(slot.back)}"
        if slot.kind not in _GIVEN:
            return f"the {slot.kind}{_before(slot.back)}"
        ways = sorted(map(str, slot.ways))
        return f"{slot.kind} {', '.join([way for way in ways if '{l' in way] or ways)}"
    if isinstance(slot, _Constant):
        return str(slot)
    return f"value {slot[1]} of its own" if slot[0] == "local" else repr(slot[1])


def _producer(slot: _Operand, kind: str) -> str:
    """Name the cell that a slot reads, by its layer or relative to the reader's."""
    layer = next(layer for of, layer in slot.ways if of == kind)
    if kind == "layer":
        return f"layer {layer}"
    if abs(layer) < 2:
        return ("the layer above", "its layer", "the layer below")[layer + 1]
    return f"{abs(layer)} layers {'below' if layer > 0 else 'above'}"


def _before(segments: int) -> str:
    return f", {segments} segments before" if segments > 1 else ", one segment before" if segments else ""
