"""What a kernel computes: terms over a tile of rows and columns, and sums over a third variable before them.

for each cell g, each z, each tile of rows m and columns n:
    stages, one after another; in each, over k: statistics[m] += ...; accumulators[m, n] += left[m, k] * right[k, n]
    outputs[g, z, m, n] = a term over all of these
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from rmtc.ir.array import (
    Array,
    Attention,
    Indices,
    Joined,
    Outside,
    Pointwise,
    Product,
    Reduction,
    Stored,
    View,
    base_of,
)
from rmtc.ir.index import Index, Variable, product_of

__all__ = [
    "Accumulated",
    "Attend",
    "Call",
    "IllegalError",
    "Kernel",
    "Load",
    "Output",
    "Pick",
    "Stage",
    "Statistic",
    "Term",
    "Terms",
    "build",
    "build_attention",
    "loads",
    "parts",
    "within",
]


class IllegalError(Exception):
    """Arrays that no one kernel computes."""


@dataclass(frozen=True, eq=False)
class Load:
    """An element of an array in memory, 0 where a guard does not hold.

    Attributes:
        guards: pairs (i, j): i < j; the first may be negative, which fails, too.
    """

    array: Array
    index: Indices
    guards: tuple[tuple[Index, Index], ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A function of terms, computed in ``inner`` and rounded to ``dtype``."""

    function: str
    args: tuple[Term | int | float | bool, ...]
    inner: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Pick:
    """One term where ``index < bound``, else the other."""

    index: Index
    bound: Index
    one: Term
    other: Term
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Statistic:
    """What a reduction is for the rows of a tile.

    Attributes:
        array: the reduction.
        index: where it is read.
        over: the variable that it runs over.
        term: what is reduced.
    """

    array: Reduction
    index: Indices
    over: Variable
    term: Term


@dataclass(frozen=True, eq=False)
class Accumulated:
    """What a product is for the rows and columns of a tile.

    Attributes:
        array: the product.
        index: where it is read.
        over: the variable that is summed over.
        left, right: its factors.
    """

    array: Product
    index: Indices
    over: Variable
    left: Term
    right: Term


Term: TypeAlias = Load | Call | Pick | Statistic | Accumulated


@dataclass(frozen=True)
class Output:
    """An array that a kernel writes: its index, and what is written there."""

    array: Array
    index: Indices
    term: Term


@dataclass(frozen=True)
class Stage:
    """A loop over a variable."""

    over: Variable
    statistics: tuple[Statistic, ...]
    accumulators: tuple[Accumulated, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel.

    Attributes:
        z, m, n: the variables of what is the same for a tile, of its rows, and of its columns.
        stages: its loops.
        outputs: what it writes; of those that have no columns, the first tile of columns does.
        arrays: the arrays that it computes on the way, in their order.
    """

    z: Variable
    m: Variable
    n: Variable
    stages: tuple[Stage, ...]
    outputs: tuple[Output, ...]
    arrays: tuple[Array, ...]

    @property
    def written(self) -> tuple[Array, ...]:
        """What it writes."""
        return tuple(output.array for output in self.outputs)

    def terms(self) -> Iterator[Term]:
        """All terms, each once."""
        return within(output.term for output in self.outputs)


@dataclass(frozen=True, eq=False)
class Attend:
    """A kernel of attention: rows m of queries, in turn all columns n of keys.

    Attributes:
        array: what it writes.
        z, m, n: batch and head; position of the query; position of the key.
        e, d: feature of query and key, and of the value.
        query, key, value, mask: the terms of these at (m, e), (n, e), (n, d) and (m, n).
        index: of what is written, at (m, d).
        arrays: the arrays that it computes on the way, in their order.
    """

    array: Attention
    z: Variable
    m: Variable
    n: Variable
    e: Variable
    d: Variable
    query: Term
    key: Term
    value: Term
    mask: Term | None
    index: Indices
    arrays: tuple[Array, ...]

    @property
    def written(self) -> tuple[Array, ...]:
        """What it writes."""
        return (self.array,)

    def terms(self) -> Iterator[Term]:
        """All terms, each once."""
        return within(each for each in (self.query, self.key, self.value, self.mask) if each is not None)


def loads(kernel: Kernel | Attend) -> list[Load]:
    """What a kernel reads from memory."""
    return list(dict.fromkeys(term for term in kernel.terms() if isinstance(term, Load)))


def within(roots: Iterable[Term]) -> Iterator[Term]:
    """Terms and all that they are made of, each once."""
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        term = todo.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        yield term
        todo.extend(parts(term))


def parts(term: Term) -> list[Term]:
    """The terms that a term is made of."""
    if isinstance(term, Call):
        return [each for each in term.args if not isinstance(each, (int, float))]
    if isinstance(term, Pick):
        return [term.one, term.other]
    if isinstance(term, Statistic):
        return [term.term]
    return [term.left, term.right] if isinstance(term, Accumulated) else []


@dataclass
class Terms:
    """Makes terms of arrays: those in memory are read, others computed where they are read.

    Attributes:
        stored: gives an array in memory for one that need not be computed.
        limit: of how many terms there may be.
    """

    stored: Callable[[Array], bool]
    limit: int = 2000
    arrays: dict[Array, None] = field(default_factory=dict)
    _known: dict[tuple[Array, Indices, tuple[tuple[Index, Index], ...]], Term] = field(default_factory=dict)
    _free: dict[int, frozenset[Variable]] = field(default_factory=dict)
    _over: dict[Index, Variable] = field(default_factory=dict)
    _loads: dict[tuple[Array, Indices, tuple[tuple[Index, Index], ...]], Load] = field(default_factory=dict)
    _statistics: dict[tuple[Array, Indices], Statistic] = field(default_factory=dict)

    def of(self, array: Array, index: Indices, guards: tuple[tuple[Index, Index], ...] = ()) -> Term:
        """The term of an array at an index.

        Raises:
            IllegalError: if there is none.
        """
        key = array, index, guards
        found = self._known.get(key)
        if found is None:
            if len(self._known) > self.limit:
                raise IllegalError(f"{array.name} takes too many terms")
            found = self._known[key] = self._of(array, index, guards)
        return found

    def _of(self, array: Array, index: Indices, guards: tuple[tuple[Index, Index], ...]) -> Term:
        if self.stored(array):
            return Load(array, index, guards)
        if isinstance(array, (Stored, Outside, Attention)):
            raise IllegalError(f"{array.name} is in no memory")
        self.arrays[array] = None
        if isinstance(array, View):
            return self.of(array.source, array.at(index), guards)
        if isinstance(array, Pointwise):
            args = tuple(
                self.of(each, _broadcast(each, index), guards) if isinstance(each, Array) else each
                for each in array.args
            )
            return Call(array.function, args, array.inner, array.dtype)
        if isinstance(array, Joined):
            return self._joined(array, index, guards)
        if guards:  # the loops of sums have no guards
            raise IllegalError(f"{array.name} is a part of something")
        if isinstance(array, Reduction):
            return self._reduced(array, index)
        assert isinstance(array, Product)
        return self._product(array, index)

    def _joined(self, array: Joined, index: Indices, guards: tuple[tuple[Index, Index], ...]) -> Term:
        place, start = index[array.dim], Index()
        ends: list[tuple[Index, Index, Array]] = []
        for part in array.parts:
            end = start + part.sizes[array.dim]
            ends.append((start, end, part))
            start = end
        found: Term | None = None
        for begin, end, part in reversed(ends):
            if place.most < begin.least or place.least >= end.most:
                continue
            within = (*index[: array.dim], place - begin, *index[array.dim + 1 :])
            last, first = place.most < end.least, place.least >= begin.most
            own = guards if last else (*guards, (place, end))
            # What lies before a part has a negative index in it.
            own = own if first else (*own, (begin - 1 - place, Index()))
            term = self.of(part, within, own)
            found = term if found is None or last else Pick(place, end, term, found, array.dtype)
        if found is None:
            raise IllegalError(f"{array.name} is read outside of its parts")
        return found

    def _reduced(self, array: Reduction, index: Indices) -> Term:
        sizes = array.source.sizes
        over = self._variable(product_of(sizes[dim] for dim in array.dims))
        rest = Index.of(over)
        inner: dict[int, Index] = {}
        for dim in reversed(array.dims):
            inner[dim], rest = (rest % sizes[dim], rest // sizes[dim]) if dim != array.dims[0] else (rest, rest)
        own = iter(index)
        source = []
        for dim in range(len(sizes)):
            if dim in inner:
                source.append(inner[dim])
                if array.keep:
                    next(own)
            else:
                source.append(next(own))
        outer = tuple(each for dim, each in enumerate(index) if not array.keep or dim not in array.dims)
        if any(over in each.variables for each in outer):
            raise IllegalError(f"{array.name} is reduced within a reduction")
        found = self._statistics.get((array, outer))
        if found is None:
            term = self.of(array.source, tuple(source))
            found = self._statistics[array, outer] = Statistic(array, outer, over, term)
        return found

    def _product(self, array: Product, index: Indices) -> Term:
        over = self._variable(array.depth)
        if any(over in each.variables for each in index):
            raise IllegalError(f"{array.name} is read within a sum")
        k, (*batch, m, n) = Index.of(over), index
        left = _broadcast(array.left, (*batch, m, k))
        right = _broadcast(array.right, (*batch, k, n))
        return Accumulated(array, index, over, self.of(array.left, left), self.of(array.right, right))

    def _variable(self, size: Index) -> Variable:
        return self._over.setdefault(size, Variable(f"k{len(self._over) or ''}", size))

    def free(self, term: Term) -> frozenset[Variable]:
        """The variables that a term depends on."""
        found = self._free.get(id(term))
        if found is None:
            own: set[Variable] = set()
            if isinstance(term, Load):
                for each in (*term.index, *(end for pair in term.guards for end in pair)):
                    own |= each.variables
            if isinstance(term, Pick):
                own |= term.index.variables | term.bound.variables
            for part in parts(term):
                own |= self.free(part)
            if isinstance(term, (Statistic, Accumulated)):
                own.discard(term.over)
            found = self._free[id(term)] = frozenset(own)
        return found


def _broadcast(array: Array, index: Indices) -> Indices:
    """The index of an operand, of what is broadcast from it."""
    own = index[len(index) - len(array.sizes) :]
    return tuple(Index() if size.value == 1 else each for size, each in zip(array.sizes, own, strict=True))


def build(outputs: Sequence[Array], stored: Callable[[Array], bool]) -> Kernel:
    """The kernel that computes arrays.

    Args:
        outputs: the arrays. The first one, whose dimensions are told apart, has rows and columns; the others have the
            same dimensions, or the rows alone.
        stored: whether an array, of those that it is made of, is in memory.

    Raises:
        IllegalError: if no kernel does.
    """
    first = outputs[0]
    dims = tuple(Variable(f"d{place}", size) for place, size in enumerate(first.sizes))
    index = tuple(Index.of(dim) if dim.size.value != 1 else Index() for dim in dims)
    own = [dim for dim in dims if dim.size.value != 1]

    def computed(array: Array) -> bool:
        return base_of(array) not in outputs and stored(array)

    probe = Terms(computed)
    root = probe.of(first, index)
    fixed, rows, columns = _roles(_below(root), own)
    z, m, n = (
        Variable(name, product_of(dim.size for dim in each))
        for name, each in (("z", fixed), ("m", rows), ("n", columns))
    )
    values: dict[Variable, Index] = {}
    for variable, group in ((z, fixed), (m, rows), (n, columns)):
        left = Index.of(variable)
        for place, dim in enumerate(reversed(group)):
            last = place == len(group) - 1
            values[dim] = left if last else left % dim.size
            left = left if last else left // dim.size
    terms = Terms(computed)
    at = tuple(each.at(values) for each in index)
    found = [Output(first, at, terms.of(first, at))]
    for other in outputs[1:]:
        where = _aligned(
            other, [(dim.size, values[dim]) for dim in own], [(dim.size, values[dim]) for dim in (*fixed, *rows)]
        )
        found.append(Output(other, where, terms.of(other, where)))
    roots = [output.term for output in found]
    for output in found:
        if n in terms.free(output.term) and not any(n in each.variables for each in output.index):
            raise IllegalError(f"{output.array.name} has no columns")
    stages = _stages(roots, terms, (z, m), n)
    return Kernel(z, m, n, stages, tuple(found), tuple(terms.arrays))


def build_attention(array: Attention, stored: Callable[[Array], bool]) -> Attend:
    """The kernel of an attention.

    Raises:
        IllegalError: if its operands cannot be computed on the way.
    """
    batch, heads, rows, _ = array.sizes
    query, key, value, mask = array.query, array.key, array.value, array.mask
    z, m, n = (Variable(*each) for each in (("z", batch * heads), ("m", rows), ("n", key.sizes[2])))
    e, d = Variable("e", query.sizes[3]), Variable("d", value.sizes[3])
    b, h = Index.of(z) // heads, Index.of(z) % heads
    terms = Terms(lambda each: base_of(each) is not array and stored(each))

    def of(operand: Array, *index: Index) -> Term:
        return terms.of(operand, _broadcast(operand, index))

    shared = array.shape[1] // key.shape[1]
    head = h // shared if shared > 1 else h
    found = (
        of(query, b, h, Index.of(m), Index.of(e)),
        of(key, b, head, Index.of(n), Index.of(e)),
        of(value, b, head, Index.of(n), Index.of(d)),
        None if mask is None else of(mask, b, h, Index.of(m), Index.of(n)),
    )
    if any(isinstance(each, (Statistic, Accumulated)) for term in found if term is not None for each in within([term])):
        raise IllegalError(f"an operand of {array.name} holds sums")
    index = _broadcast(array, (b, h, Index.of(m), Index.of(d)))
    return Attend(array, z, m, n, e, d, *found, index, (*terms.arrays, array))


def _aligned(other: Array, whole: Sequence[tuple[Index, Index]], rows: Sequence[tuple[Index, Index]]) -> Indices:
    """Where another output is written: its dimensions are all of the first one's, or its rows."""
    sizes = [size.value for size in other.sizes if size.value != 1]
    for known in (whole, rows):
        if [size.value for size, _ in known] == sizes:
            left = iter(value for _, value in known)
            return tuple(next(left) if size.value != 1 else Index() for size in other.sizes)
    raise IllegalError(f"{other.name} has other dimensions")


def _below(root: Term) -> list[Statistic | Accumulated]:
    """The sums that are on the way to a term, but for those within others."""
    found: dict[Statistic | Accumulated, None] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        term = todo.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if isinstance(term, (Statistic, Accumulated)):
            found[term] = None
        else:
            todo.extend(parts(term))
    return list(found)


def _roles(
    sums: Iterable[Statistic | Accumulated], dims: Sequence[Variable]
) -> tuple[list[Variable], list[Variable], list[Variable]]:
    """Which dimensions are the same for a tile, which are its rows, and which its columns."""
    fixed: set[Variable] = set()
    rows: set[Variable] = set()
    columns: set[Variable] = set()
    products = False
    for each in sums:
        if isinstance(each, Statistic):
            rows |= _variables(each.index)
            continue
        products = True
        *batch, m, n = each.index
        right = each.array.right.sizes
        for place, index in enumerate(reversed(batch)):
            own = len(right) > place + 2 and right[-3 - place].value != 1
            (fixed if own else rows).update(index.variables)
        rows |= m.variables
        columns |= n.variables
    rows -= fixed
    if columns & (rows | fixed):
        raise IllegalError("a dimension is of rows and of columns")
    if not sums:
        columns = {dims[-1]} if dims else set()
    elif not products:
        columns = set(dims) - rows - fixed
    rows |= set(dims) - columns - fixed
    return [d for d in dims if d in fixed], [d for d in dims if d in rows], [d for d in dims if d in columns]


def _variables(index: Iterable[Index]) -> set[Variable]:
    return {variable for each in index for variable in each.variables}


def _stages(roots: Sequence[Term], terms: Terms, outer: tuple[Variable, Variable], n: Variable) -> tuple[Stage, ...]:
    """Loops, each after those whose sums it reads.

    Checks: a statistic depends on rows alone; the left factor of a product on rows and its own variable, the right one
    on columns and that.
    """
    level: dict[int, int] = {}
    sums: list[tuple[int, Statistic | Accumulated]] = []

    def depth(term: Term) -> int:
        known = level.get(id(term))
        if known is not None:
            return known
        below = max((depth(part) for part in parts(term)), default=0)
        if isinstance(term, (Statistic, Accumulated)):
            _check(term, terms, outer, n)
            sums.append((below, term))
            below += 1
        level[id(term)] = below
        return below

    for root in roots:
        depth(root)
    found: dict[tuple[int, Variable], list[Statistic | Accumulated]] = {}
    for at, term in dict.fromkeys(sums):
        found.setdefault((at, term.over), []).append(term)
    stages = []
    for (_, over), each in sorted(found.items(), key=lambda item: item[0][0]):
        statistics = tuple(term for term in each if isinstance(term, Statistic))
        stages.append(Stage(over, statistics, tuple(term for term in each if isinstance(term, Accumulated))))
    return tuple(stages)


def _check(term: Statistic | Accumulated, terms: Terms, outer: tuple[Variable, Variable], n: Variable) -> None:
    z, m = outer
    own = {z, m, term.over}
    if isinstance(term, Statistic):
        if not terms.free(term.term) <= own:
            raise IllegalError(f"{term.array.name} is no function of rows")
        return
    if not terms.free(term.left) <= own:
        raise IllegalError(f"the left factor of {term.array.name} is no function of rows")
    if not terms.free(term.right) <= {z, n, term.over}:
        raise IllegalError(f"the right factor of {term.array.name} is no function of columns")
    if _sums_in(term.right):
        raise IllegalError(f"the right factor of {term.array.name} holds sums")
    if any(isinstance(each, Accumulated) for each in _sums_in(term.left)):
        raise IllegalError(f"the left factor of {term.array.name} holds a product")


def _sums_in(term: Term) -> list[Statistic | Accumulated]:
    return _below(term)
