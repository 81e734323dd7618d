"""The loop over segments as an IR: the operations of a segment, its reads from earlier ones, and its cells."""

from __future__ import annotations

import functools
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rmtc.affine import Affine
from rmtc.errors import VerifyError
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.program import Op, Program, Source, Src, Val, leaves, map_leaves, show


class Environment(NamedTuple):
    """The sizes that a constant may depend on.

    Attributes:
        s: the segment.
        S: number of segments.
        B: batch size.
        T: positions of this segment.
        N: positions of all segments.
    """

    s: int
    S: int
    B: int
    T: int
    N: int

    def of(self, number: Any) -> Any:
        """Return the value of an integer constant; anything else is returned as it is."""
        return int(number.number(**self._asdict())) if isinstance(number, Affine) else number


class Row(NamedTuple):
    """Operand: the value of operation ``number`` of the segment ``back`` before this one."""

    back: int
    number: int

    def __str__(self) -> str:
        return f"%{self.number}" if self.back == 0 else f"s-{self.back}.%{self.number}"


class Item(NamedTuple):
    """Operand: an item of an input that is a list with one item per segment, ``list[number]rest``."""

    list: str
    number: int | Affine
    rest: str

    def __str__(self) -> str:
        return f"{self.list}[{self.number}]{self.rest}"


class Outer(NamedTuple):
    """Operand: operation ``number`` of the part ``before`` or ``after`` the loop."""

    part: str
    number: int

    def __str__(self) -> str:
        return f"{self.part}.%{self.number}"


class Where(NamedTuple):
    """Operand of the part after the loop: a value of one segment, counted from the start or (negative) the end."""

    segment: int
    number: tuple[int, ...]  # in each row kind; -1 where that row does not make it

    def __str__(self) -> str:
        last = len(self.number) - 1
        return f"s[{self.segment}].%{self.number[min(self.segment, last) if self.segment >= 0 else last]}"


class Every(NamedTuple):
    """Items of a list in the part after the loop: one value from each segment, in order.

    ``number`` holds the operation's index in each row kind: the explicit rows, then the steady one.
    """

    number: tuple[int, ...]

    def __str__(self) -> str:
        return f"every s: s.%{self.number[-1]}"


class Numbered(NamedTuple):
    """The name of a result with a number in it that depends on the segment or on the number of segments."""

    before: str
    number: Affine
    after: str

    def at(self, environment: Environment) -> str:
        """Return the name for given sizes."""
        return f"{self.before}{environment.of(self.number)}{self.after}"

    def __str__(self) -> str:
        return f"{self.before}{self.number}{self.after}"


class Layout(NamedTuple):
    """The prologue, the layers and the epilogue of a segment, as half-open ranges of its operations."""

    prologue: tuple[int, int]
    layers: tuple[tuple[int, int], ...]
    epilogue: tuple[int, int]

    def layer_of(self, index: int) -> int:
        """Return the layer of an operation: -1 for the prologue, L for the epilogue."""
        if index < self.prologue[1]:
            return -1
        layer = bisect_right(self.layers, (index, sys.maxsize)) - 1
        return layer if layer >= 0 and index < self.layers[layer][1] else len(self.layers)

    def bounds(self, layer: int) -> tuple[int, int]:
        """Return the range of a layer, of the prologue below them, or of the epilogue above them."""
        inside = 0 <= layer < len(self.layers)
        return self.layers[layer] if inside else self.prologue if layer < 0 else self.epilogue


CARRIED = "carried:"
"""Before the names of what a call hands on to one that goes on, as results and as sources."""


class Key(NamedTuple):
    """An operation of an unrolled loop. Segment -1 is before the loop, segment S after it."""

    segment: int
    number: int


@dataclass(frozen=True)
class SegmentLoop:
    """A loop over S segments, for every S.

    Attributes:
        before, after: operations outside the loop.
        rows: the first segments, which differ from the later ones or read values from before the loop.
        steady: every later segment.
        outputs: the results by name, as operands of the part after the loop. An :class:`Every` under a
            :class:`Numbered` name is one result per segment.
        sources: the tensors that exist before the call.
        layouts: position of the layers, one for each of ``rows`` and then for ``steady``.
        segment_length: positions of a segment.
        growing: names of the inputs that grow with the number of segments.
        dependences: dependences between cells.
        classes: ``classes[row][layer]``, rows as in ``layouts``; names of equivalence classes of bodies.
        stage_classes: the same for prologue and epilogue.
        class_notes: for each class, its difference from the one it resembles.
        fixed: sizes for which the loop was captured, ``batch`` or ``tail``. Another value needs a capture of its own.
            So does a last segment of ``below`` positions or more. ``apart`` is there if it runs after the loop.
    """

    before: tuple[Op, ...]
    rows: tuple[tuple[Op, ...], ...]
    steady: tuple[Op, ...]
    after: tuple[Op, ...]
    outputs: dict[str | Numbered, Any]
    sources: dict[str, Source]
    segment_length: int
    growing: frozenset[str] = frozenset()
    layouts: tuple[Layout, ...] = ()
    dependences: tuple[Dependence, ...] = ()
    classes: tuple[tuple[str, ...], ...] = ()
    stage_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    class_notes: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """The number of layers, 1 without layouts."""
        return len(self.layouts[-1].layers) if self.layouts else 1

    def row(self, segment: int) -> tuple[Op, ...]:
        """Return the operations of a segment."""
        return self.rows[segment] if segment < len(self.rows) else self.steady

    def runs_steady(self, segment: int) -> bool:
        """Tell whether a segment runs the operations of the steady ones."""
        row = self.row(segment)
        return row is self.steady or [op.target for op in row] == [op.target for op in self.steady]

    def layout(self, segment: int) -> Layout:
        """Return the layout of a segment."""
        return self.layouts[min(segment, len(self.layouts) - 1)]

    def other_size(self, batch: int, tail: int) -> str | None:
        """Say which size of a call is another one than the loop was captured for; None if none is."""
        for name, what, value in (("batch", "a batch of", batch), ("tail", "a last segment of", tail)):
            if self.fixed.get(name, value) != value:
                return f"the loop was captured for {what} {self.fixed[name]}, and this call has one of {value}"
        if not self.segment_length * ("apart" in self.fixed) < tail < self.fixed.get("below", tail + 1):
            return f"the loop was captured for last segments of another kind than this one of {tail} positions"
        return None

    @property
    def ends_short(self) -> bool:
        """True if the last segment is another one, and may not leave what others do: none goes on from it."""
        return not self.fixed.keys().isdisjoint({"below", "apart"})

    @functools.cached_property
    def reads_tail(self) -> bool:
        """True if an operation of a segment reads the length of the segment."""
        given = (leaf for row in (*self.rows, self.steady) for op in row for leaf in leaves(op.args))
        return any(isinstance(leaf, Affine) and "T" in leaf.atoms for leaf in given)

    @functools.cached_property
    def counts_segments(self) -> bool:
        """True if an integer depends on the number of segments, or of all positions."""
        ops = (op for part in (self.before, *self.rows, self.steady, self.after) for op in part)
        given = [*(leaf for op in ops for leaf in leaves(op.args)), *self.outputs.values()]
        return any(isinstance(leaf, Affine) and not leaf.atoms.isdisjoint({"S", "N"}) for leaf in given)

    def rows_before(self, row: int, back: int) -> range:
        """Return the rows that the segment ``back`` before a segment of a row may have."""
        steady = len(self.rows)
        return range(row - back, row - back + 1) if row < steady else range(max(0, steady - back), steady + 1)

    def class_of(self, row: int, layer: int) -> str:
        """Return the class of a cell of a row, or of its prologue or epilogue; empty if that has no operations."""
        if 0 <= layer < self.layers:
            return self.classes[row][layer]
        names = self.stage_classes.get("prologue" if layer < 0 else "epilogue")
        return names[row] if names else ""

    def cell(self, key: Key, segments: int) -> Cell | None:
        """Return the cell of an operation of the unrolled loop, or None outside the loop."""
        if not 0 <= key.segment < segments:
            return None
        return Cell(key.segment, self.layout(key.segment).layer_of(key.number))

    @property
    def furthest_result(self) -> int:
        """The furthest segment that a result reads, counted from the end: 1 is the last, 0 stands for none."""
        given = [*self.outputs.values(), *(leaf for op in self.after for leaf in leaves(op.args))]
        return max((-each.segment for each in given if isinstance(each, Where)), default=0)

    @property
    def fewest(self) -> int:
        """The fewest segments of a call that shows all kinds of them, and all that results are made of."""
        return max(len(self.rows) + 2, self.furthest_result)

    def after_of(self, segments: int) -> list[Op | None]:
        """Return the operations after the loop for a number of segments.

        None stands for an operation that reads segments that do not exist. A list loses the items that such segments
        would make:

            cat([s[-3].%4, s[-2].%4, s[-1].%4], 1)   ->   cat([s[-2].%4, s[-1].%4], 1), for two segments
        """
        found: list[Op | None] = []

        def there(leaf: Any) -> bool:
            if isinstance(leaf, Where):
                return -segments <= leaf.segment < segments
            return not (isinstance(leaf, Outer) and leaf.part == "after") or found[leaf.number] is not None

        for op in self.after:
            args = tuple(tuple(item for item in arg if there(item)) if type(arg) is tuple else arg for arg in op.args)
            lost = any(
                not left if type(arg) is tuple and arg else not there(arg)
                for arg, left in zip(op.args, args, strict=True)
            )
            found.append(None if lost else op.with_args(args))
        return found

    def outputs_of(
        self, segments: int, row: int = 0, hands_on: bool = True, leaves: bool = True
    ) -> dict[str | Numbered, Any]:
        """Return the results of a number of segments: all but what so few do not hand on.

        Args:
            segments: number of segments.
            row: row kind of the first one.
            hands_on: whether anything is to be handed on.
            leaves: whether new values are to be left in the model.
        """

        def there(name: str | Numbered, operand: Any) -> bool:
            if not leaves and str(name).startswith("state:"):
                return False
            if not isinstance(operand, Where) or not str(name).startswith(CARRIED):
                return True
            at = segments + operand.segment
            return hands_on and at >= 0 and operand.number[min(at + row, len(operand.number) - 1)] >= 0

        return {name: operand for name, operand in self.outputs.items() if there(name, operand)}

    def unroll(self, segments: int, batch: int, tail: int) -> tuple[Program, list[Key]]:
        """Unroll the loop into the flat program for given sizes, in the order the segments run.

        Args:
            segments: number of segments, at least 1.
            batch: batch size.
            tail: positions of the last segment, with those that it leaves out.

        Returns:
            The program, and the key of each of its operations.

        Raises:
            VerifyError: if the results of so few segments are not known, or two results have one name.
        """
        # State of the unrolling: the program so far, and where in it each operation of the loop is.
        total = (segments - 1) * self.segment_length + tail
        index: dict[tuple[int, int], int] = {}
        sources = dict(self.sources)
        ops: list[Op] = []
        keys: list[Key] = []

        def environment(segment: int) -> Environment:
            length = tail if segment >= segments - 1 else self.segment_length
            return Environment(segment, segments, batch, length, total)

        # Operands: from the loop's spelling to values and sources of the flat program.
        def value(operand: Where | Every, at: int) -> Val:
            number = operand.number[min(at, len(operand.number) - 1)] if 0 <= at < segments else -1
            if number < 0:
                raise VerifyError(f"what {segments} segment(s) return is not known: the first segment differs")
            return Val(index[at, number])

        def resolve(segment: int, sizes: Environment, arg: Any) -> Any:
            if isinstance(arg, Row):
                return Val(index[segment - arg.back, arg.number])
            if not isinstance(arg, (Outer, Where, Item)):
                return sizes.of(arg)
            if isinstance(arg, Outer):
                made = (-1 if arg.part == "before" else segments, arg.number)
                if made not in index:
                    raise VerifyError(f"what {segments} segment(s) return is not known: it is made of more")
                return Val(index[made])
            if isinstance(arg, Where):
                return value(arg, arg.segment if arg.segment >= 0 else segments + arg.segment)
            name = str(arg._replace(number=sizes.of(arg.number)))
            if name not in sources:  # the runs that were folded had fewer items
                sources[name] = replace(sources[str(arg._replace(number=0))], names=(name,))
            return Src(name)

        def expand(segment: int, sizes: Environment, arg: Any) -> list[Any]:
            if isinstance(arg, Every):
                return [value(arg, at) for at in range(segments)]
            return [resolve(segment, sizes, arg)]

        # Operations: before the loop, segment by segment, and after it.
        def run(segment: int, body: Sequence[Op | None]) -> None:
            sizes = environment(segments if segment < 0 else segment)
            one, several = (functools.partial(each, segment, sizes) for each in (resolve, expand))
            for number, op in enumerate(body):
                if op is None:
                    continue
                key = Key(segment, number)
                index[key] = len(ops)
                keys.append(key)
                args = _expanded(op.args, several) if segment >= segments else map_leaves(op.args, one)
                ops.append(Op(op.target, args, op.origin))

        run(-1, self.before)
        for segment in range(segments):
            run(segment, self.row(segment))
        run(segments, self.after_of(segments))
        # Results: one per name, or one per segment for a numbered name.
        outputs, last = dict[str, Any](), environment(segments)
        for name, operand in self.outputs.items():
            for at in range(segments) if isinstance(operand, Every) else (segments,):
                known = name.at(environment(at)) if isinstance(name, Numbered) else name
                if known in outputs:
                    raise VerifyError(f"two results of {segments} segment(s) are {known}")
                outputs[known] = value(operand, at) if isinstance(operand, Every) else resolve(segments, last, operand)
        return Program(ops, sources, outputs), keys

    def op(self, key: Key, segments: int) -> Op:
        """Return the operation of the loop that an operation of the program unrolled to some segments is."""
        parts = self.before if key.segment < 0 else self.after_of(segments) if key.segment >= segments else None
        op = self.row(key.segment)[key.number] if parts is None else parts[key.number]
        assert op is not None
        return op

    def carried(self, keys: Sequence[Key], segments: int) -> list[tuple[Dependence, frozenset[int]]]:
        """Return each dependence with the operations of the unrolled program that make its tensor.

        Args:
            keys: the operations, as :meth:`unroll` gives them.
            segments: number of segments.
        """
        at: dict[tuple[int, int], int] = {key: number for number, key in enumerate(keys)}
        return [
            (each, frozenset(at[s, n] for s in range(segments) for n in each.made_in(s) if (s, n) in at))
            for each in self.dependences
        ]

    def verify(self) -> None:
        """Check that operands are made before they are read, that layouts divide rows, and that classes hold.

        Cells of one class run the same operations, with the same constants but for numbers.

        Raises:
            VerifyError: if one is not, which is an error of the pass that made the loop.
        """
        kinds = (*self.rows, self.steady)

        def is_there(leaf: Any, row: int, made: int) -> bool:
            """Tell whether an operand of the operation after ``made`` others of a row is there.

            Row -1 is before the loop, -2 after it.
            """
            match leaf:
                case Row(0, number):
                    return row >= 0 and 0 <= number < made
                case Row(back, number):
                    # the steady row's segments before it are the last explicit ones, or steady
                    before = range(row - back, row - back + 1) if row < len(self.rows) else range(row - back, row + 1)
                    return row >= 0 and back > 0 and all(at >= 0 and number < len(kinds[at]) for at in before)
                case Outer("before", number):
                    return 0 <= number < (made if row == -1 else len(self.before))
                case Outer(_, number):
                    return row == -2 and 0 <= number < made
                case Where(_, numbers) | Every(numbers):
                    good = row == -2 and len(numbers) <= len(kinds)
                    return good and all(number < len(kind) for number, kind in zip(numbers, kinds, strict=False))
                case Src(name):
                    return name in self.sources
            return True

        parts = [(-1, "before", self.before), *((at, f"segment {at}", kind) for at, kind in enumerate(kinds))]
        for row, part, body in [*parts, (-2, "after", self.after)]:
            for number, op in enumerate(body):
                for leaf in leaves(op.args):
                    if not is_there(leaf, row, number):
                        raise VerifyError(f"{part} %{number} reads {leaf}, which is not there yet")
        for name, operand in self.outputs.items():
            if not is_there(operand, -2, len(self.after)):
                raise VerifyError(f"{name} reads {operand}, which is not there yet")
        if self.layouts and len(self.layouts) != len(kinds):
            raise VerifyError(f"{len(self.layouts)} layouts of {len(kinds)} rows")
        for layout, kind in zip(self.layouts, kinds, strict=False):
            ranges = [layout.prologue, *layout.layers, layout.epilogue]
            ends = [0, *(end for _, end in ranges)]
            if [begin for begin, _ in ranges] != ends[:-1] or ends[-1] != len(kind):
                raise VerifyError(f"{ranges} do not divide {len(kind)} operations")
        self._verify_classes(kinds)

    def _verify_classes(self, kinds: Sequence[Sequence[Op]]) -> None:
        """Hold each cell against the first one of its class."""
        first: dict[str, list[Any]] = {}
        tables = (*((self.classes,) if self.classes else ()), *self.stage_classes.values())
        if any(len(each) != len(kinds) for each in tables):
            raise VerifyError(f"there are not classes for each of {len(kinds)} rows")
        for row, (layout, kind) in enumerate(zip(self.layouts, kinds, strict=False)):
            cells = [*zip(self.classes[row] if self.classes else (), layout.layers, strict=False)]
            cells += [(of[row], getattr(layout, stage)) for stage, of in self.stage_classes.items()]
            if self.classes and len(self.classes[row]) != len(layout.layers):
                raise VerifyError(f"row {row} has classes for {len(self.classes[row])} layers")
            for name, (begin, end) in cells:
                form = [(op.target, _alike(op.args)) for op in kind[begin:end]]
                if name and first.setdefault(name, form) != form:
                    raise VerifyError(f"cells of class {name} run different operations")

    def __str__(self) -> str:
        lines: list[str] = []

        def part(title: str, body: tuple[Op, ...], layout: Layout | None = None) -> None:
            lines.append(title)
            for number, op in enumerate(body):
                stage = ""
                if layout is not None:
                    layer = layout.layer_of(number)
                    stage = "pro" if layer < 0 else "epi" if layer >= len(layout.layers) else f"l{layer}"
                lines.append(f"  {stage:>4} %{number} = {op}")

        part("before the loop:", self.before)
        for number, row in enumerate(self.rows):
            part(f"segment {number}:", row, self.layouts[number] if self.layouts else None)
        part(f"segment s >= {len(self.rows)}:", self.steady, self.layouts[-1] if self.layouts else None)
        part("after the loop:", self.after)
        lines += [f"return {name} = {show(value)}" for name, value in self.outputs.items()]
        return "\n".join(lines)


def _alike(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what the arguments of operations of one class have in common: numbers and tensors may differ by cell."""

    def common(leaf: Any) -> Any:
        if isinstance(leaf, (Row, Outer, Src, Item)):
            return "tensor"
        return "number" if type(leaf) in (int, float) or isinstance(leaf, Affine) else (type(leaf), leaf)

    return map_leaves(args, common)


def _expanded(args: tuple[Any, ...], values: Callable[[Any], list[Any]]) -> tuple[Any, ...]:
    """Replace each leaf of nested arguments by some values."""
    return tuple(value for arg in args for value in ([_expanded(arg, values)] if type(arg) is tuple else values(arg)))
