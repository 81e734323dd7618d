"""Knowledge of a segment's place in the text: values that say where a segment is, and loops that must not know."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch

from rmtc.affine import Affine
from rmtc.errors import RefusedError
from rmtc.ir.program import COPIES, SPLITS, VIEWS, Op, Src, leaves
from rmtc.ir.segment_loop import Environment, Every, Item, Outer, Row, SegmentLoop, Where

aten = torch.ops.aten

_SHAPES = frozenset({*VIEWS, *SPLITS, aten.reshape.default, aten.expand.default})
_CREATE = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
_LAST = (aten.linear.default, aten.layer_norm.default)  # of the last dimension, or the last ones


def counts(leaf: Any) -> bool:
    """Tell whether a number depends on the segment, on how many there are, or on the length of the text."""
    value = leaf.number if isinstance(leaf, Item) else leaf
    return isinstance(value, Affine) and not value.atoms.isdisjoint({"s", "S", "N"})


class Places:
    """Knowledge of the place of a segment in the text, in a loop's values.

    A value before the loop is ``free`` of the text, ``along`` it position by position, in ``pieces`` of a segment each,
    made of ``all`` of it, or a ``count``: of positions or segments.
    """

    def __init__(self, loop: SegmentLoop, growing: Mapping[str, tuple[int, ...]]) -> None:
        self.loop, self.growing = loop, growing
        self.before, self.dims = list[str](), list[int | None]()  # what a value knows, and in which dimension it grows
        for op in loop.before:
            kind = self._kind(op)
            dim = self._along(op) if kind == "along" else self._dim(op.args[0]) if kind == "pieces" else None
            self.before.append("all" if kind == "along" and dim is None else kind)
            self.dims.append(dim)

    def _kind(self, op: Op) -> str:
        given = leaves(op.args)
        read = {self.before[leaf.number] for leaf in given if isinstance(leaf, Outer)}
        read |= {"along" for leaf in given if self._is_text(leaf)}
        if read == {"along"} and self._divides(op):
            return "pieces"
        if op.target in _CREATE and not any(map(counts, given)):
            return "free"
        counted = any(map(counts, given))
        if read <= {"free"}:
            return "count" if counted else "free"
        if read <= {"free", "count"}:
            return "count"
        return "along" if read <= {"along", "free"} and not counted else "all"

    def _along(self, op: Op) -> int | None:
        """The dimension in which a value of a text grows with it, if each position of it is made of that position."""
        tensors = [leaf for leaf in leaves(op.args) if isinstance(leaf, (Src, Outer, Item))]
        texts, others = [e for e in tensors if self._of_text(e)], [e for e in tensors if not self._of_text(e)]
        known = [(self._rank(each), self._dim(each)) for each in texts]
        grown = [(r, d) for r, d in known if r is not None and d is not None]
        if op.form is None or len(grown) < len(texts):
            return None
        rank, dim = len(op.form[0]), grown[0][1]
        places = {r - 1 - d for r, d in grown}  # from the last dimension: as broadcast
        first = tensors[0] is texts[0]
        if op.target is aten.unsqueeze.default:
            at = int(op.args[1]) if op.args[1] >= 0 else int(op.args[1]) + rank
            return dim + (at <= dim)
        if op.target in COPIES or (op.target is aten.embedding.default and not first and len(texts) == 1):
            return dim
        if op.target in _LAST and first and len(texts) == 1:
            last = len(op.args[1]) if op.target is aten.layer_norm.default else 1
            return dim if dim < rank - last else None
        if torch.Tag.pointwise not in getattr(op.target, "tags", ()) or len(places) > 1:
            return None
        (place,) = places
        return rank - 1 - place if all(self._is_one(each, place) for each in others) else None

    def _rank(self, leaf: Any) -> int | None:
        shape = self._shape(leaf)
        return None if shape is None else len(shape)

    def _shape(self, leaf: Any) -> tuple[int, ...] | None:
        if isinstance(leaf, Outer):
            return self.loop.before[leaf.number].shape
        source = self.loop.sources.get(leaf.name) if isinstance(leaf, Src) else None
        return None if source is None else source.shape

    def _is_one(self, leaf: Any, place: int) -> bool:
        """Tell whether a tensor is the same for all positions, which are its dimension ``place`` from the last."""
        shape = self._shape(leaf)
        return shape is not None and (place >= len(shape) or shape[len(shape) - 1 - place] == 1)

    def refuse(self) -> None:
        """Refuse a loop whose segments know their place otherwise than by the part of the text that they read.

        Labels of a loss that nothing in a segment reads may: it is the loss of the text that the call is given.

        Raises:
            RefusedError: with the first operation that does.
        """
        labels = self._labels()
        for number, op in enumerate(self.loop.steady):
            if number in labels:
                continue
            given = [leaf for leaf in leaves(op.args) if not isinstance(leaf, Item)]
            first = given[0] if given else None
            kind = self.before[first.number] if isinstance(first, Outer) else "along" if self._is_text(first) else ""
            part = op.target in VIEWS or op.target in SPLITS or op.target is operator.getitem
            if part and kind in ("along", "pieces"):
                if not self._reads_own(op, first, kind == "pieces"):
                    raise RefusedError(
                        "a call leaves positions of its text out, or reads some twice, so two calls are not as one",
                        location=op.location,
                        remedy="cut or pad the text before the call",
                    )
                continue
            what = None
            if any(isinstance(leaf, Outer) and self.before[leaf.number] != "free" for leaf in given):
                what = "what was computed before the text was cut"
            elif any(map(counts, given)):
                what = "the number of the segment, or the length of the text"
            elif any(map(self._is_text, given)):
                what = "the whole text"
            if what is not None:
                raise _counting(op, f"a segment reads {what}")
        for op in self.loop.after:
            operands = leaves(op.args)
            counted = any(map(counts, operands))
            made = bool(operands) and self._is_made(operands[0]) and (op.target in _SHAPES or op.target in _CREATE)
            if any(map(self._is_count, operands)) or (counted and not made):
                raise _counting(op, "a result depends on the number of segments, or the length of the text")

    def _labels(self) -> frozenset[int]:
        """Return the operations of a segment that make nothing but labels of losses, which results alone read."""
        readers: dict[int, set[tuple[int, int]]] = {}  # by which operation, as which of its operands
        for number, op in enumerate(self.loop.steady):
            for at, leaf in enumerate(leaves(op.args)):
                if isinstance(leaf, Row):
                    readers.setdefault(leaf.number, set()).add((number if leaf.back == 0 else -1, at))
        given = [*self.loop.outputs.values(), *(leaf for op in self.loop.after for leaf in leaves(op.args))]
        results = {each.number[-1] for each in given if isinstance(each, (Where, Every))}
        losses = {
            number
            for number, op in enumerate(self.loop.steady)
            if op.target is aten.cross_entropy_loss.default and number not in readers
        }
        found = set[int]()
        for number in sorted(readers.keys() - results, reverse=True):
            if all(reader in found or (reader in losses and at == 1) for reader, at in readers[number]):
                found.add(number)
        return frozenset(found)

    def _is_made(self, leaf: Any) -> bool:
        """Tell whether a value after the loop is of the segments, or of the text, and as long as these are."""
        if isinstance(leaf, Outer) and leaf.part == "before":
            return self.before[leaf.number] in ("along", "pieces", "all")
        return isinstance(leaf, (Where, Every, Outer)) or self._is_text(leaf)

    def _is_count(self, leaf: Any) -> bool:
        return isinstance(leaf, Outer) and leaf.part == "before" and self.before[leaf.number] == "count"

    def _is_text(self, leaf: Any) -> bool:
        return isinstance(leaf, Src) and leaf.name in self.loop.growing

    def _dim(self, leaf: Any) -> int | None:
        """The dimension in which a text grows, if there is one."""
        dims = self.growing.get(leaf.name, ()) if isinstance(leaf, Src) else ()
        if isinstance(leaf, Outer):
            return self.dims[leaf.number]
        return dims[0] if len(dims) == 1 else None

    def _of_text(self, leaf: Any) -> bool:
        return self._is_text(leaf) or (isinstance(leaf, Outer) and self.before[leaf.number] in ("along", "pieces"))

    def _divides(self, op: Op) -> bool:
        """Tell whether an operation divides a text into its segments."""
        given, text = leaves(op.args[1:]), op.args[0]
        dim = self._dim(text) if self._of_text(text) else None
        if dim is None:
            return False
        if op.target is aten.split.Tensor:
            return list(given) == [self.loop.segment_length, dim]
        counted = [place for place, leaf in enumerate(given) if counts(leaf)]
        return (
            op.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
            and counted == [dim]
            and str(given[dim]) == "S"
            and list(given[dim + 1 : dim + 2]) == [self.loop.segment_length]
        )

    def _reads_own(self, op: Op, text: Any, divided: bool) -> bool:
        """Tell whether a segment reads of the text, or of its pieces, just what is its own."""
        given, length, dim = leaves(op.args), self.loop.segment_length, self._dim(text)
        if dim is None:
            return False
        for segment, tail in itertools.product(range(3), (1, length)):
            sizes = Environment(segment, 3, 2, tail if segment == 2 else length, 2 * length + tail)
            read = list(map(sizes.of, given))
            if divided:
                own = read[1:] == [dim, segment] if op.target is aten.select.int else read[1:] == [segment]
                own = own and op.target in (aten.select.int, operator.getitem)
            else:
                ends = (segment * length, segment * length + sizes.T)
                own = op.target is aten.slice.Tensor and len(read) == 4
                own = own and read[1] == dim and (read[2], min(read[3], sizes.N)) == ends
            if not own:
                return False
        return True


def _counting(op: Op, what: str) -> RefusedError:
    return RefusedError(
        f"{what}, so it would be something else in another call",
        location=op.location,
        remedy="let what is computed depend on the segment and on what it is handed alone; positions that count from "
        "the beginning of the text are to be arguments of the call",
    )
