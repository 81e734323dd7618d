"""An estimate of the instructions that a kernel issues, from its terms and its tiles, before anything is compiled.

A kernel may be bound by neither memory nor matrix products, but by the instructions that its warps issue: a loop that
computes a factor of a product issues some for each of its elements, in each tile that needs them. The constants are
fitted to the machine code of kernels of ARMT's layers in bfloat16 for sm_80, sm_90 and sm_100: most are within a factor
of 1.3, all within 2 (tests/passes/test_instructions.py). Other targets have those of sm_80.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rmtc.affine import Affine, Quotient, Remainder, Variable, variables_of
from rmtc.ir.cost import Issue
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Accumulated, Call, Load, Piecewise, Statistic, Term, free_variables, parts
from rmtc.passes.bodies.tiles import Config

LANES = 32
"""Threads of a warp. Those of AMD have 64, and take as long for twice as many elements."""

_COSTLY = dict.fromkeys(("div", "reciprocal", "addcdiv"), "division")
_COSTLY |= dict.fromkeys(("sigmoid", "silu", "tanh", "elu", "gelu", "gelu_tanh", "erf", "softplus"), "sigmoid")
_COSTLY |= dict.fromkeys(("exp", "log", "rsqrt", "sqrt", "sin", "cos"), "exponential")


def issued(kernel: Kernel | Attend, issue: Issue, config: Config, big: bool = False) -> float:
    """Estimate the instructions of warps that a kernel issues for one cell.

    Args:
        kernel: the kernel.
        issue: what a target's warps issue.
        config: the kernel's tiles.
        big: whether it is printed so that its products run fastest, see :func:`rmtc.passes.bodies.tiles.is_big`.
    """
    count = _Count(kernel, issue, config)
    return count.attention(kernel) if isinstance(kernel, Attend) else count.product(kernel, big)


def overlaps(kernel: Kernel | Attend) -> bool:
    """Tell whether products run while other instructions are issued: if no factor in a loop is computed on the way."""
    if isinstance(kernel, Attend):
        return _whole(kernel.key) and _whole(kernel.value)
    products = [term for stage in kernel.stages for term in stage.accumulators]
    return all(_whole(each) for term in products for each in (term.left, term.right))


class _Count:
    def __init__(self, kernel: Kernel | Attend, issue: Issue, config: Config) -> None:
        self.issue, self.config = issue, config
        self.lanes, self.free = LANES * config.warps, free_variables()
        names = {kernel.m: "BLOCK_M", kernel.n: "BLOCK_N"}
        if isinstance(kernel, Attend):
            names |= {kernel.e: "BLOCK_E", kernel.d: "BLOCK_D"}
        self.blocks = {variable: config.blocks.get(name, 1) for variable, name in names.items()}

    def elements(self, variables: Iterable[Variable], blocks: Mapping[Variable, int]) -> float:
        """Return the elements per lane of a tile over variables."""
        return max(1.0, math.prod(blocks.get(each, 1) for each in variables) / self.lanes)

    def terms(self, roots: Iterable[Term], blocks: Mapping[Variable, int], seen: set[int], rows: bool = False) -> float:
        """Return the instructions for computing terms, each once, for tiles of given sizes.

        Args:
            roots: the terms.
            blocks: the sizes of tiles by variable.
            seen: the terms that are computed already, to which these are added.
            rows: whether they are outside of loops over products.
        """
        issue, found, todo = self.issue, 0.0, list(roots)
        while todo:
            term = todo.pop()
            if id(term) in seen or isinstance(term, (Statistic, Accumulated)):
                continue
            seen.add(id(term))
            todo += parts(term)
            places = term.index if isinstance(term, Load) else (term.index,) if isinstance(term, Piecewise) else ()
            divisions = sum(map(_divisions, places))
            if isinstance(term, Load) and (term.guards or divisions):
                each = issue.row_scattered if rows else issue.scattered
            elif isinstance(term, Load):
                each = issue.row_load if rows else issue.load
            elif isinstance(term, Call) and term.function in _COSTLY:
                each = getattr(issue, _COSTLY[term.function])
            else:
                each = issue.row_simple if rows else issue.simple
            found += (each + issue.place * divisions) * self.elements(self.free(term), blocks)
        return found

    def product(self, kernel: Kernel, big: bool) -> float:
        issue, blocks = self.issue, self.blocks
        tile = issue.tile + (issue.persistent if big else 0.0)
        # Loops over other variables come before the outputs.
        for stage in kernel.stages:
            depth = self.config.blocks.get("BLOCK_K", 1)
            inside, seen, turn = {**blocks, stage.over: depth}, set[int](), issue.turn
            for statistic in stage.statistics:
                turn += self.terms([statistic.term], inside, seen, rows=not stage.accumulators)
                turn += issue.reduced * self.elements((kernel.m, stage.over), inside) + issue.statistic
            for product in stage.accumulators:
                for factor in (product.left, product.right):
                    elements = self.elements(self.free(factor), inside)
                    if isinstance(factor, Load) and _whole(factor):
                        vectors = elements * factor.array.dtype.itemsize / 16
                        turn += issue.described if big else issue.vector * vectors
                    else:
                        turn += self.terms([factor], inside, seen) + issue.staged * elements
                size = blocks[kernel.m] * blocks[kernel.n] * depth
                turn += issue.matrix * size / 2048 / self.config.warps
            tile += math.ceil(stage.over.size.value / depth) * turn
        tile += self.terms([output.term for output in kernel.outputs], blocks, set(), rows=True)
        tile += issue.store * sum(self.elements(variables_of(output.index), blocks) for output in kernel.outputs)
        tiles = math.prod(math.ceil(each.size.value / blocks[each]) for each in (kernel.m, kernel.n))
        return tiles * kernel.z.size.value * self.config.warps * tile

    def attention(self, kernel: Attend) -> float:
        issue, blocks, m, n = self.issue, self.blocks, self.blocks[kernel.m], self.blocks[kernel.n]
        operands = [kernel.key, kernel.value, *([] if kernel.mask is None else [kernel.mask])]
        block = issue.block + self.terms([each for each in operands if not _whole(each)], blocks, set())
        block += issue.score * self.elements((kernel.m, kernel.n), blocks)
        block += issue.weighted * self.elements((kernel.m, kernel.d), blocks)
        tiles, keys = math.ceil(kernel.m.size.value / m), kernel.n.size.value
        seen = [min(keys, (tile + 1) * m) if kernel.array.causal else keys for tile in range(tiles)]
        total = sum(math.ceil(each / n) for each in seen) * block
        total += tiles * (issue.queries + self.terms([kernel.query], blocks, set(), rows=True))
        return kernel.z.size.value * self.config.warps * total


def _whole(term: Term) -> bool:
    """Tell whether a term is read as it lies in memory."""
    return isinstance(term, Load) and not term.guards and not any(map(_divisions, term.index))


def _divisions(index: Affine) -> int:
    """Return the number of quotients and remainders in an index."""
    found, todo = 0, [index]
    while todo:
        for atoms, _ in todo.pop().terms:
            for atom in atoms:
                if isinstance(atom, (Quotient, Remainder)):
                    found += 1
                    todo += [atom.of, atom.by]
    return found
