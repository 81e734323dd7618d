"""Segment loops as JSON: numbers, words and lists of them, from which a loop is made anew.

Nothing that is read runs. An operation is stored by its label, and the reader takes it from the operations that it is
handed. Tensors that exist before the call are stored by name, and their values never. Reading checks the kind of every
number and word. What a loop computes is checked by those who read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import torch

from rmtc.affine import Affine
from rmtc.errors import Location, RmtcError
from rmtc.ir.cells import Dependence
from rmtc.ir.formula import Extent
from rmtc.ir.program import Form, NegativeZero, Op, Origin, Source, Src
from rmtc.ir.segment_loop import Every, Item, Layout, Numbered, Outer, Row, SegmentLoop, Where
from rmtc.ir.spelling import read_extent

Json: TypeAlias = Any
"""Values that :mod:`json` writes and reads, without floats."""


class StoredError(RmtcError, ValueError):
    """A loop that has no stored form, or data that are no stored loop."""

    title = "cannot store or read a loop"


def write_loop(loop: SegmentLoop) -> Json:
    """Write a loop as JSON, but for its sources' values, what grows, and the length of a segment.

    Raises:
        StoredError: if an operand is of a kind that has no form.
    """
    writer = _OperationWriter()
    return {
        "before": writer.ops(loop.before),
        "rows": [*map(writer.ops, loop.rows)],
        "steady": writer.ops(loop.steady),
        "after": writer.ops(loop.after),
        "outputs": [[_write_name(name), _write(value)] for name, value in loop.outputs.items()],
        "sources": [*loop.sources],
        "layouts": [[each.prologue, each.layers, each.epilogue] for each in loop.layouts],
        "dependences": [*map(writer.dependence, loop.dependences)],
        "classes": loop.classes,
        "stage_classes": loop.stage_classes,
        "class_notes": loop.class_notes,
        "fixed": loop.fixed,
        "locations": [*map(list, writer.locations)],
        "origins": [*map(list, writer.origins)],
    }


def read_loop(
    data: Json,
    targets: Mapping[str, Callable[..., Any]],
    sources: Mapping[str, Source],
    growing: frozenset[str],
    segment_length: int,
) -> SegmentLoop:
    """Read a loop that :func:`write_loop` wrote.

    Args:
        data: the JSON.
        targets: the operations that the loop may run, by label.
        sources: the tensors that it may read, by name.
        growing: names of the inputs that grow with the number of segments.
        segment_length: positions of a segment.

    Raises:
        StoredError: if the data are no loop of these operations and tensors.
    """
    try:
        reader = _OperationReader(data, targets)
        names = [*map(_text, data["sources"])]
        return SegmentLoop(
            before=reader.ops(data["before"]),
            rows=tuple(map(reader.ops, data["rows"])),
            steady=reader.ops(data["steady"]),
            after=reader.ops(data["after"]),
            outputs={_read_name(name): _read(value) for name, value in data["outputs"]},
            sources={name: sources[name] for name in names},
            segment_length=segment_length,
            growing=growing,
            layouts=tuple(
                Layout(_range(prologue), tuple(map(_range, layers)), _range(epilogue))
                for prologue, layers, epilogue in data["layouts"]
            ),
            dependences=tuple(map(reader.dependence, data["dependences"])),
            classes=tuple(tuple(map(_text, row)) for row in data["classes"]),
            stage_classes={_text(key): tuple(map(_text, names)) for key, names in data["stage_classes"].items()},
            class_notes={_text(key): _text(note) for key, note in data["class_notes"].items()},
            fixed={_text(key): _whole(value) for key, value in data["fixed"].items()},
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise StoredError(f"no loop: {type(error).__name__}: {error}") from error


class _OperationWriter:
    """A writer of operations, which lists each place of the user's code once."""

    def __init__(self) -> None:
        self.locations: dict[Location, int] = {}
        self.origins: dict[tuple[Any, ...], int] = {}

    def location(self, location: Location | None) -> int | None:
        return None if location is None else self.locations.setdefault(location, len(self.locations))

    def ops(self, ops: Iterable[Op]) -> Json:
        return [*map(self._op, ops)]

    def _op(self, op: Op) -> Json:
        if op.covers:
            raise StoredError(f"{op.label} covers other operations")
        origin = op.origin._replace(location=self.location(op.location))  # type: ignore[arg-type]
        form = None if op.form is None else [_write_dtype(op.form[1]), *op.form[0]]
        return [op.label, _write(op.args), self.origins.setdefault(tuple(origin), len(self.origins)), form]

    def dependence(self, each: Dependence) -> Json:
        ends = None if each.layers is None else [*map(_write_extent, each.layers)]
        places = [self.location(each.location), self.location(each.consumer_location)]
        words = [each.tensor, each.producer, each.consumer]
        return [[*map(_write_extent, each.distance)], words, places, ends, [sorted(makers) for makers in each.makers]]


class _OperationReader:
    """A reader of operations from a closed list."""

    def __init__(self, data: Json, targets: Mapping[str, Callable[..., Any]]) -> None:
        self._targets = targets
        self._locations = [
            Location(_text(file), _whole(line), _text(function)) for file, line, function in data["locations"]
        ]
        self._origins = [
            Origin(self._location(place), *map(_text, words)) for place, *words in map(tuple, data["origins"])
        ]

    def _location(self, place: Json) -> Location | None:
        return None if place is None else self._locations[_natural(place)]

    def ops(self, data: Json) -> tuple[Op, ...]:
        return tuple(map(self._op, data))

    def _op(self, data: Json) -> Op:
        label, args, origin, form = data
        read = _read(args)
        if type(read) is not tuple:
            raise StoredError(f"{label} has no list of arguments")
        return Op(self._targets[label], read, self._origins[_natural(origin)], None if form is None else _form(form))

    def dependence(self, data: Json) -> Dependence:
        (ds, dl), words, places, ends, makers = data
        tensor, producer, consumer = map(_text, words)
        location, consumer_location = map(self._location, places)
        layers = None if ends is None else (_extent(ends[0]), _extent(ends[1]))
        made_by = tuple(frozenset(map(_natural, numbers)) for numbers in makers)
        given = location, consumer_location, layers, made_by
        return Dependence((_extent(ds), _extent(dl)), tensor, producer, consumer, *given)


def _write(value: Any) -> Json:
    """Write an operand or a constant. What is no list, whole number or word is an object with one key, its kind."""
    match value:
        case None | bool() | int() | str() if type(value) in _SCALARS:
            return value
        case Row(back, number):
            return {"row": [back, number]}
        case Src(name):
            return {"source": name}
        case Outer(part, number):
            return {"outer": [part, number]}
        case Where(segment, numbers):
            return {"where": [segment, list(numbers)]}
        case Every(numbers):
            return {"every": list(numbers)}
        case Item(of, number, rest):
            return {"item": [of, _write(number), rest]}
        case Affine():
            return {"affine": _write_affine(value)}
        case float() if type(value) in (float, NegativeZero):
            return {"float": float.hex(value)}
        case torch.dtype():
            return {"dtype": _write_dtype(value)}
        case torch.device():
            return {"device": str(value)}
        case torch.layout() | torch.memory_format():
            return {"named": str(value).removeprefix("torch.")}
    if type(value) is tuple:
        return [*map(_write, value)]
    raise StoredError(f"{value!r} has no stored form")


_SCALARS = (type(None), bool, int, str)


def _read(data: Json) -> Any:
    if type(data) in _SCALARS:
        return data
    if type(data) is list:
        return tuple(map(_read, data))
    ((kind, given),) = data.items()
    return _KINDS[kind](given)


def _read_float(text: Json) -> float:
    value = float.fromhex(text)
    return NegativeZero(value) if text.startswith("-0x0.0") else value


def _read_item(data: Json) -> Item:
    of, number, rest = data
    read = _read(number)
    if type(read) not in (int, Affine):
        raise StoredError(f"{number} is no number of an item")
    return Item(_text(of), read, _text(rest))


def _read_outer(data: Json) -> Outer:
    part, number = data
    if part not in ("before", "after"):
        raise StoredError(f"{part} is no part of a loop")
    return Outer(part, _natural(number))


def _read_dtype(name: Json) -> torch.dtype:
    found = getattr(torch, _text(name))
    if not isinstance(found, torch.dtype):
        raise StoredError(f"{name} is no dtype")
    return found


def _read_named(name: Json) -> Any:
    found = getattr(torch, _text(name))
    if not isinstance(found, (torch.layout, torch.memory_format)):
        raise StoredError(f"{name} is no layout")
    return found


def _read_device(name: Json) -> torch.device:
    try:
        return torch.device(_text(name))
    except RuntimeError as error:
        raise StoredError(f"{name} is no device") from error


_KINDS: dict[str, Callable[[Json], Any]] = {
    "row": lambda data: Row(_natural(data[0]), _natural(data[1])),
    "source": lambda data: Src(_text(data)),
    "outer": _read_outer,
    "where": lambda data: Where(_whole(data[0]), tuple(map(_whole, data[1]))),
    "every": lambda data: Every(tuple(map(_whole, data))),
    "item": _read_item,
    "affine": lambda data: _read_affine(data),
    "float": _read_float,
    "dtype": _read_dtype,
    "device": _read_device,
    "named": _read_named,
}


def _write_affine(value: Affine) -> Json:
    if not all(isinstance(atom, str) for atoms, _ in value.terms for atom in atoms):
        raise StoredError(f"{value} has no stored form")
    factors = ((atoms, Fraction(factor)) for atoms, factor in value.terms)
    return [[list(atoms), factor.numerator, factor.denominator] for atoms, factor in factors]


_SIZES = ("s", "S", "B", "T", "N")


def _read_affine(data: Json) -> Affine:
    terms: list[tuple[tuple[str, ...], int | Fraction]] = []
    for atoms, above, below in data:
        if any(atom not in _SIZES for atom in atoms):
            raise StoredError(f"{atoms} are no sizes")
        factor = Fraction(_whole(above), _whole(below))
        terms.append((tuple(atoms), factor.numerator if factor.denominator == 1 else factor))
    return Affine(tuple(terms))


def _write_name(name: str | Numbered) -> Json:
    return name if isinstance(name, str) else [name.before, _write_affine(name.number), name.after]


def _read_name(data: Json) -> str | Numbered:
    if isinstance(data, str):
        return data
    before, number, after = data
    return Numbered(_text(before), _read_affine(number), _text(after))


def _write_extent(extent: Extent) -> Json:
    return extent if isinstance(extent, int) else str(extent)


def _extent(data: Json) -> Extent:
    return read_extent(_whole(data) if isinstance(data, int) else _text(data))


def _write_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _form(data: Json) -> Form:
    dtype, *shape = data
    return tuple(map(_natural, shape)), _read_dtype(dtype)


def _range(data: Json) -> tuple[int, int]:
    begin, end = map(_natural, data)
    return begin, end


def _whole(data: Json) -> int:
    if type(data) is not int:
        raise StoredError(f"{data!r} is no whole number")
    return data


def _natural(data: Json) -> int:
    if _whole(data) < 0:
        raise StoredError(f"{data} is below 0")
    return int(data)


def _text(data: Json) -> str:
    if type(data) is not str:
        raise StoredError(f"{data!r} is no word")
    return data
