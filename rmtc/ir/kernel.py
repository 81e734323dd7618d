"""Kernels: terms over a tile of rows and columns, and sums over a third variable before them.

for each cell g, each z, each tile of rows m and columns n:
    stages, one after another; in each, over k: statistics[m] += ...; accumulators[m, n] += left[m, k] * right[k, n]
    outputs[g, z, m, n] = a term over all of these
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rmtc.affine import Affine, Variable, product_of, variables_of
from rmtc.grouping import by_key
from rmtc.ir.array import Array, Attention, Indices, Product, Stored, base_of
from rmtc.ir.terms import (
    Accumulated,
    IllegalError,
    Load,
    Statistic,
    Term,
    Terms,
    broadcast,
    free_variables,
    parts,
    within,
)

Free: TypeAlias = Callable[[Term], frozenset[Variable]]


@dataclass(frozen=True)
class Output:
    """An array that a kernel writes, with the index and the term that it writes there."""

    array: Array
    index: Indices
    term: Term


@dataclass(frozen=True)
class Stage:
    """A loop over one variable, with the statistics and the accumulators that it sums up."""

    over: Variable
    statistics: tuple[Statistic, ...]
    accumulators: tuple[Accumulated, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel over tiles of rows and columns.

    Attributes:
        z, m, n: variables of the dimensions that are fixed in a tile, of its rows, and of its columns.
        stages: loops that run before the outputs.
        outputs: arrays that it writes. The first tile of columns writes those that have no columns.
        arrays: arrays that it computes, outputs among them, in the order in which they were first read.
    """

    z: Variable
    m: Variable
    n: Variable
    stages: tuple[Stage, ...]
    outputs: tuple[Output, ...]
    arrays: tuple[Array, ...]

    @property
    def written(self) -> tuple[Array, ...]:
        """The arrays that it writes."""
        return tuple(output.array for output in self.outputs)

    def terms(self) -> Iterator[Term]:
        """Yield all terms, each once."""
        return within(output.term for output in self.outputs)


@dataclass(frozen=True, eq=False)
class Attend:
    """A kernel of attention that goes over all columns n of keys for its rows m of queries.

    Attributes:
        array: the array that it writes.
        z, m, n: batch and head; position of the query; position of the key.
        e, d: feature of query and key, and of the value.
        query, key, value, mask: the terms of these at (m, e), (n, e), (n, d) and (m, n).
        index: index at which it writes, for (m, d).
        arrays: arrays that it computes, the written one last.
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
        """The array that it writes."""
        return (self.array,)

    def terms(self) -> Iterator[Term]:
        """Yield all terms, each once."""
        return within(each for each in (self.query, self.key, self.value, self.mask) if each is not None)


@dataclass(frozen=True, eq=False)
class Multiply:
    """A product of stored arrays, computed by a library.

    Attributes:
        array: the product. Its right factor is one matrix, or both factors have as many matrices.
        kernel: a kernel that computes the same.
    """

    array: Product
    kernel: Kernel

    @property
    def written(self) -> tuple[Array, ...]:
        """The array that it writes."""
        return (self.array,)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it computes."""
        return self.kernel.arrays


def multiplied(kernel: Kernel, stored: Callable[[Array], bool]) -> Multiply | None:
    """Return a kernel as a product by a library, or None if a library cannot run it.

    That needs a kernel that is one product and no more, of stored factors of one floating-point dtype. No row of a
    factor may be shared by several cells.

    Args:
        kernel: the kernel.
        stored: tells whether an array is in memory.
    """
    product = kernel.written[0]
    if not isinstance(product, Product) or len(kernel.written) > 1:
        return None
    left, right = product.left, product.right
    bases = [base_of(each) for each in (left, right)]
    alike = not right.sizes[:-2] or left.shape[:-2] == right.shape[:-2] == product.shape[:-2]
    shared = any(isinstance(each, Stored) and each.cells > 1 for each in bases)  # several cells share a row of it
    real = left.dtype == right.dtype == product.dtype and product.dtype.is_floating_point
    if not (alike and real and not shared and stored(left) and stored(right)):
        return None
    return Multiply(product, kernel)


def loads(kernel: Kernel | Attend | Multiply) -> list[Load]:
    """Return the loads of a kernel from memory, each once."""
    if isinstance(kernel, Multiply):
        kernel = kernel.kernel
    return list(dict.fromkeys(term for term in kernel.terms() if isinstance(term, Load)))


def build(outputs: Sequence[Array], stored: Callable[[Array], bool]) -> Kernel:
    """Build the kernel that computes some arrays.

    Args:
        outputs: the arrays. The dimensions of the first one are divided into fixed ones, rows and columns. Each of the
            others has the same dimensions, or all but the columns.
        stored: tells whether an array that they are made of is in memory.

    Raises:
        IllegalError: if no single kernel computes them.
    """
    first = outputs[0]
    dims = tuple(Variable(f"d{place}", size) for place, size in enumerate(first.sizes))
    index = tuple(Affine.of(dim) if dim.size.value != 1 else Affine() for dim in dims)
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
    values: dict[Variable, Affine] = {}
    for variable, group in ((z, fixed), (m, rows), (n, columns)):
        left = Affine.of(variable)
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
    roots, free = [output.term for output in found], free_variables()
    for output in found:
        sums = any(isinstance(each, Accumulated) for each in within([output.term]))  # which are whole tiles
        if (sums or n in free(output.term)) and not any(n in each.variables for each in output.index):
            raise IllegalError(f"{output.array.name} has no columns")
    stages = _stages(roots, free, (z, m), n)
    return Kernel(z, m, n, stages, tuple(found), tuple(terms.arrays))


def build_attention(array: Attention, stored: Callable[[Array], bool]) -> Attend:
    """Build the kernel of an attention.

    Raises:
        IllegalError: if its operands cannot be computed on the way.
    """
    batch, heads, rows, _ = array.sizes
    query, key, value, mask = array.query, array.key, array.value, array.mask
    z, m, n = (Variable(*each) for each in (("z", batch * heads), ("m", rows), ("n", key.sizes[2])))
    e, d = Variable("e", query.sizes[3]), Variable("d", value.sizes[3])
    b, h = Affine.of(z) // heads, Affine.of(z) % heads
    terms = Terms(lambda each: base_of(each) is not array and stored(each))

    def of(operand: Array, *index: Affine) -> Term:
        return terms.of(operand, broadcast(operand, index))

    shared = array.shape[1] // key.shape[1]
    head = h // shared if shared > 1 else h
    found = (
        of(query, b, h, Affine.of(m), Affine.of(e)),
        of(key, b, head, Affine.of(n), Affine.of(e)),
        of(value, b, head, Affine.of(n), Affine.of(d)),
        None if mask is None else of(mask, b, h, Affine.of(m), Affine.of(n)),
    )
    if any(isinstance(each, (Statistic, Accumulated)) for term in found if term is not None for each in within([term])):
        raise IllegalError(f"an operand of {array.name} holds sums")
    index = broadcast(array, (b, h, Affine.of(m), Affine.of(d)))
    return Attend(array, z, m, n, e, d, *found, index, (*terms.arrays, array))


def _aligned(other: Array, whole: Sequence[tuple[Affine, Affine]], rows: Sequence[tuple[Affine, Affine]]) -> Indices:
    """Return the index at which another output is written.

    Its dimensions are all of those of the first output, or all but the columns.

    Raises:
        IllegalError: if they are neither.
    """
    sizes = [size.value for size in other.sizes if size.value != 1]
    for known in (whole, rows):
        if [size.value for size, _ in known] == sizes:
            left = iter(value for _, value in known)
            return tuple(next(left) if size.value != 1 else Affine() for size in other.sizes)
    raise IllegalError(f"{other.name} has other dimensions")


def _below(root: Term) -> list[Statistic | Accumulated]:
    """Find the sums on the way to a term, except those within other sums."""
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
    """Divide dimensions into those that are fixed in a tile, its rows, and its columns.

    Raises:
        IllegalError: if a dimension would be one of rows and of columns.
    """
    fixed: set[Variable] = set()
    rows: set[Variable] = set()
    columns: set[Variable] = set()
    products = False
    for each in sums:
        if isinstance(each, Statistic):
            rows |= variables_of(each.index)
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


def _stages(roots: Sequence[Term], free: Free, outer: tuple[Variable, Variable], n: Variable) -> tuple[Stage, ...]:
    """Build the loops, each after those whose sums it reads.

    Checks: a statistic depends on rows alone. The left factor of a product depends on rows and its own variable, the
    right one on columns and that variable.

    Raises:
        IllegalError: if a check fails.
    """
    level: dict[int, int] = {}
    sums: list[tuple[int, Statistic | Accumulated]] = []

    def depth(term: Term) -> int:
        known = level.get(id(term))
        if known is not None:
            return known
        below = max((depth(part) for part in parts(term)), default=0)
        if isinstance(term, (Statistic, Accumulated)):
            _check(term, free, outer, n)
            sums.append((below, term))
            below += 1
        level[id(term)] = below
        return below

    for root in roots:
        depth(root)
    found = by_key(((at, term.over), term) for at, term in dict.fromkeys(sums))
    stages = []
    for (_, over), each in sorted(found.items(), key=lambda item: item[0][0]):
        statistics = tuple(term for term in each if isinstance(term, Statistic))
        stages.append(Stage(over, statistics, tuple(term for term in each if isinstance(term, Accumulated))))
    return tuple(stages)


def _check(term: Statistic | Accumulated, free: Free, outer: tuple[Variable, Variable], n: Variable) -> None:
    z, m = outer
    own = {z, m, term.over}
    if isinstance(term, Statistic):
        if not free(term.term) <= own:
            raise IllegalError(f"{term.array.name} is no function of rows")
        return
    if not free(term.left) <= own:
        raise IllegalError(f"the left factor of {term.array.name} is no function of rows")
    if not free(term.right) <= {z, n, term.over}:
        raise IllegalError(f"the right factor of {term.array.name} is no function of columns")
    if _below(term.right):
        raise IllegalError(f"the right factor of {term.array.name} holds sums")
    if any(isinstance(each, Accumulated) for each in _below(term.left)):
        raise IllegalError(f"the left factor of {term.array.name} holds a product")
