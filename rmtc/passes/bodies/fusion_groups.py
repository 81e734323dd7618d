"""fusion-groups: cut a body into kernels.

Each array of a body either lies in memory or is computed in the kernels that read it. At first all arrays lie in
memory, and a kernel of its own makes each. Then arrays are taken out of memory one after another, the last first. That
is done where all readers can compute the array on the way, and where all of that is estimated to take no longer. Then
an array made of another may be kept in the place of that one, and kernels over the same rows become one.

    a = linear(x, w); b = silu(a); c = b * y      ->      [a b c]  c = silu(linear(x, w)) * y

The estimate is a roofline. A launch takes a time of its own, plus the longest of three times: for moving what it reads
and writes, for its products, and for issuing its instructions. An array that several tiles or kernels compute counts
once for each. A product of arrays in
memory is left to a library where that takes less time. A library's products may be faster, but nothing is computed on
their way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rmtc import heuristics
from rmtc.affine import Variable
from rmtc.ir.array import Array, Attention, Nest, Outside, Pointwise, Stored, View, base_of
from rmtc.ir.cost import Machine
from rmtc.ir.kernel import Attend, Kernel, Multiply, build, build_attention, loads, multiplied
from rmtc.ir.program import Op
from rmtc.ir.terms import Accumulated, IllegalError, Load, free_variables
from rmtc.passes.bodies.instructions import issued, overlaps
from rmtc.passes.bodies.tiles import is_big, tiles_of

Computed: TypeAlias = Kernel | Attend | Multiply
Group: TypeAlias = Computed | Outside


@dataclass(frozen=True)
class Groups:
    """A body cut into launches.

    Attributes:
        nest: the body.
        groups: the kernels, and the operations that are left to torch, each after those that it reads.
    """

    nest: Nest
    groups: tuple[Group, ...]

    def __str__(self) -> str:
        lines = [f"{self.nest.name}: {len(self.groups)} launches"]
        for number, group in enumerate(self.groups):
            if isinstance(group, Outside):
                lines.append(f"  {number}: torch  {group.name} = {group.ops[0]}")
                continue
            written = ", ".join(each.name for each in group.written)
            read = ", ".join(dict.fromkeys(base_of(each.array).name for each in loads(group)))
            lines.append(f"  {number}: {kind_of(group)}  {written} of {read}")
            lines += [f"       {op}" for op in operations_of(group, self.nest)]
        return "\n".join(lines)


_CELLS = 8
"""Number of cells that the estimates of a body's kernels are for."""


def fusion_groups(nest: Nest, viewed: Callable[[View], bool], machine: Machine) -> Groups:
    """Cut a body into kernels.

    Args:
        nest: the body.
        viewed: tells whether a view of an array in memory is a view there, too.
        machine: the machine that the estimates are for.
    """
    return _KernelCut(nest, viewed, machine).groups()


class _KernelCut:
    def __init__(self, nest: Nest, viewed: Callable[[View], bool], machine: Machine) -> None:
        self.nest, self.viewed, self.machine = nest, viewed, machine
        self.kept = {self._kept(each) for each in nest.results}
        for each in nest.arrays:
            if isinstance(each, Outside):
                self.kept |= {self._kept(read) for read in each.reads}
        self.stored = {each for each in nest.arrays if not isinstance(each, View)} | self.kept
        self.kernels: dict[Array, Computed] = {}

    def _kept(self, array: Array) -> Array:
        """Return the array that has to lie in memory for the given one to: itself, or what it is a view of."""
        while isinstance(array, View) and self.viewed(array):
            array = array.source
        return array

    def in_memory(self, array: Array) -> bool:
        if array in self.stored:
            return True
        return isinstance(array, View) and self.viewed(array) and self.in_memory(array.source)

    def build(self, outputs: Sequence[Array]) -> Computed:
        if isinstance(outputs[0], Attention):
            if len(outputs) > 1:
                raise IllegalError("attention has one result")
            return build_attention(outputs[0], self.in_memory)
        kernel = build(outputs, self.in_memory)
        library = multiplied(kernel, self.in_memory)
        return library if library is not None and self.time(library) < self.time(kernel) else kernel

    def groups(self) -> Groups:
        made = [each for each in self.nest.arrays if each in self.stored and not isinstance(each, (Stored, Outside))]
        for each in made:
            self.kernels[each] = self.build([each])
        for each in reversed(made):  # fuse arrays into all of their readers, the last first
            if each not in self.kept and not isinstance(each, Attention):
                self._change({each}, set())
        for each in made:
            if each in self.stored and each not in self.kept and not isinstance(each, Attention):
                self._move(each)
        return Groups(self.nest, tuple(self._ordered(self._merged())))

    def _move(self, array: Array) -> None:
        """Keep an array made of another in memory in place of that one, as long as that takes less time."""
        made_of = {array}
        for each in self.nest.arrays:
            if each in self.stored or isinstance(each, Stored) or made_of.isdisjoint(each.reads):
                continue
            made_of.add(each)
            if isinstance(each, Pointwise) and self._change({array}, {each}):
                array, made_of = each, {each}

    def _change(self, less: set[Array], more: set[Array]) -> bool:
        """Take arrays out of memory, or exchange them for others, unless that takes longer.

        An exchange has to save time.

        Returns:
            Whether the change was made.
        """
        changed = less | more
        old = [
            each
            for each, kernel in self.kernels.items()
            if each in less or changed & {*kernel.arrays, *read_by(kernel)}
        ]
        stored, self.stored = self.stored, (self.stored - less) | more
        try:
            new = {each: self.build([each]) for each in (*old, *more) if each not in less}
        except IllegalError:
            self.stored = stored
            return False
        before, after = (sum(map(self.time, each)) for each in (map(self.kernels.__getitem__, old), new.values()))
        if after > before or (more and after == before):
            self.stored = stored
            return False
        for each in less:
            del self.kernels[each]
        self.kernels.update(new)
        return True

    def time(self, kernel: Computed) -> float:
        return estimate(kernel, self.machine, _CELLS)

    def _merged(self) -> list[Computed]:
        """Return the kernels, with those over the same rows merged where that takes less time."""
        place = {array: number for number, array in enumerate(self.nest.arrays)}
        found = [self.kernels[each] for each in sorted(self.kernels, key=place.__getitem__)]
        while True:
            pairs = ((pair, self._both(*pair, found)) for pair in itertools.permutations(found, 2))
            pair, both = next((each for each in pairs if each[1] is not None), ((), None))
            if both is None:
                return found
            found = [each for each in found if each not in pair] + [both]

    def _both(self, one: Computed, other: Computed, found: Sequence[Computed]) -> Kernel | None:
        if isinstance(one, Attend) or isinstance(other, Attend):
            return None
        if not _alike(one.written[0], other.written[0]) or self._between(one, other, found):
            return None
        try:
            both = self.build([*one.written, *other.written])
        except IllegalError:
            return None
        assert isinstance(both, Kernel)
        return both if self.time(both) < self.time(one) + self.time(other) else None

    def _between(self, one: Group, other: Group, found: Sequence[Group]) -> bool:
        """Tell whether one of two groups reads, through a third, what the other writes."""
        outside = [each for each in self.nest.arrays if isinstance(each, Outside)]
        everything: list[Group] = [*found, *outside]
        writer = {array: group for group in everything for array in _written(group)}
        for start, end in ((one, other), (other, one)):
            todo = [writer[array] for array in read_by(end) if array in writer and writer[array] is not start]
            seen: list[Group] = []
            while todo:
                group = todo.pop()
                if group is start:
                    return True
                if any(group is each for each in seen):
                    continue
                seen.append(group)
                todo += [writer[array] for array in read_by(group) if array in writer]
        return False

    def _ordered(self, kernels: Sequence[Computed]) -> list[Group]:
        place = {array: number for number, array in enumerate(self.nest.arrays)}
        outside = {id(each.op): each for each in self.nest.arrays if isinstance(each, Outside)}.values()
        left: list[Group] = sorted([*kernels, *outside], key=lambda group: max(place[each] for each in _written(group)))
        done: set[Array] = {each for each in self.nest.arrays if isinstance(each, Stored)}
        found: list[Group] = []
        while left:
            group = next(each for each in left if read_by(each) <= done)
            left.remove(group)
            found.append(group)
            done |= {*_written(group)}
            if isinstance(group, Outside):  # one run gives all of its results
                done |= {each for each in self.nest.arrays if isinstance(each, Outside) and each.op is group.op}
        return found


def kind_of(group: Group) -> str:
    """Name the kind of a launch in a word. ``rows`` is a kernel that multiplies nothing."""
    if isinstance(group, (Multiply, Outside)):
        return "library" if isinstance(group, Multiply) else "torch"
    return "attention" if isinstance(group, Attend) else "product" if _products(group) else "rows"


def operations_of(group: Group, nest: Nest) -> tuple[Op, ...]:
    """Return the operations that a launch does, in the order of its body.

    An operation that several launches do is in each of them.
    """
    ops = group.ops if isinstance(group, Outside) else [op for array in group.arrays for op in array.ops]
    order = {id(op): number for number, op in enumerate(op for array in nest.arrays for op in array.ops)}
    return tuple(sorted({id(op): op for op in ops}.values(), key=lambda op: order[id(op)]))


def _written(group: Group) -> tuple[Array, ...]:
    return (group,) if isinstance(group, Outside) else group.written


def read_by(group: Group) -> set[Array]:
    """Return the arrays in memory that a group reads. For views these are the arrays that they are views of."""
    if isinstance(group, Outside):
        return {base_of(each) for each in group.reads}
    return {base_of(each.array) for each in loads(group)} - set(group.written)


def _alike(one: Array, other: Array) -> bool:
    """Tell whether two arrays may have the same rows."""
    a, b = ([size for size in each.shape if size != 1] for each in (one, other))
    return a == b or (len(b) < len(a) and all(size in a for size in b)) or not b


def _products(kernel: Kernel) -> list[Accumulated]:
    return [each for stage in kernel.stages for each in stage.accumulators]


def estimate(kernel: Computed, machine: Machine, cells: int) -> float:
    """Estimate the seconds that a launch takes for ``cells`` cells."""
    moved, products = work(kernel, machine)
    dtype = kernel.written[0].dtype
    if isinstance(kernel, Multiply):
        stages, issuing, overlapped = kernel.kernel.stages, None, True
    else:
        big = is_big(kernel) and (machine.descriptors or isinstance(kernel, Kernel))
        issuing, overlapped = issued(kernel, machine.issue, tiles_of(kernel, big), big), overlaps(kernel)
        stages = () if isinstance(kernel, Attend) else kernel.stages
    loops = [kernel.n] if isinstance(kernel, Attend) else [stage.over for stage in stages]
    turns = sum(math.ceil(each.size.value / heuristics.KERNEL_TILE) for each in loops)
    return machine.seconds(moved, products, dtype, issued=issuing, overlaps=overlapped, turns=turns, cells=cells)


def work(kernel: Computed, machine: Machine) -> tuple[float, float]:
    """Return the bytes that a cell moves, and its operations of products."""
    if isinstance(kernel, Multiply):
        return work(kernel.kernel, machine)
    m, n = kernel.m.size.value, kernel.n.size.value
    rows = columns = heuristics.KERNEL_TILE
    if isinstance(kernel, Kernel) and kernel.stages and not _products(kernel):
        columns = heuristics.KERNEL_ROW
    tiles = {kernel.m: math.ceil(m / rows), kernel.n: math.ceil(n / columns)}
    outer = {kernel.z, kernel.m} if isinstance(kernel, Attend) else {kernel.z, kernel.m, kernel.n}
    variables = free_variables()

    def extent(own: Iterable[Variable]) -> float:
        return math.prod(each.size.value for each in own)

    def again(own: frozenset[Variable]) -> float:
        """Return the number of tiles that compute the same value."""
        return math.prod(count for variable, count in tiles.items() if variable in outer and variable not in own)

    moved = float(sum(math.prod(each.shape) * each.dtype.itemsize for each in kernel.written))
    products = 0.0
    for term in kernel.terms():
        own = variables(term)
        if isinstance(term, Load):
            size = min(extent(own), math.prod(base_of(term.array).shape)) * term.array.dtype.itemsize
            moved += size * (1 + (again(own) - 1) / machine.cached)
        elif isinstance(term, Accumulated):
            products += 2 * extent({*variables(term.left), *variables(term.right)})
    if isinstance(kernel, Attend):
        pairs = extent((kernel.z, kernel.m, kernel.n)) / (2 if kernel.array.causal else 1)
        products += 2 * pairs * (kernel.e.size.value + kernel.d.size.value)
    return moved, products
