"""Print the statements of kernels: values, indices, and tiles of operands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from rmtc.affine import Affine, Atom, Quotient, Symbol, Variable, variables_of
from rmtc.codegen.triton.functions import FUNCTIONS
from rmtc.codegen.triton.spelling import (
    Forms,
    cells_of,
    covered,
    dtype_of,
    dtype_text,
    is_wide,
    key_of,
    number_text,
    widened,
)
from rmtc.codegen.triton.style import DESCRIBED, KernelSource, Style
from rmtc.ir.array import Array, base_of
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Accumulated, Call, Load, Piecewise, Statistic, Term, free_variables


@dataclass
class Scope:
    """A block of statements.

    Attributes:
        indent: the white space before each statement.
        own: the variables that exist only inside of it.
    """

    indent: str
    own: frozenset[Variable]
    lines: list[str] = field(default_factory=list)
    known: dict[object, str] = field(default_factory=dict)


class Printer:
    """Prints a kernel in a style."""

    def __init__(self, kernel: Kernel | Attend, style: Style) -> None:
        self.kernel, self.style = kernel, style
        self.persistent = style.persistent and isinstance(kernel, Kernel)
        self.head: list[str] = []
        self.described: dict[tuple[Array, int, object], str] = {}  # by what tells two of one array apart, too
        self.free = free_variables()
        self.pointers: dict[Array, str] = {}
        self.sizes: dict[Symbol, str] = {}
        self.scopes = [Scope("        " if self.persistent else "    ", frozenset())]
        self.count = 0
        self.blocks: list[str] = []
        self.sums: dict[int, str] = {}
        self.sure: set[str] = set()  # numbers that are all below their size

    # Statements.

    def say(self, line: str) -> None:
        self.scopes[-1].lines.append(f"{self.scopes[-1].indent}{line}")

    def scope_for(self, variables: Iterable[Variable]) -> Scope:
        """Return the outermost block that has all variables."""
        needed = set(variables)
        for scope in reversed(self.scopes):
            if needed & scope.own:
                return scope
        return self.scopes[0]

    def assign(self, key: object, prefix: str, text: str, variables: Iterable[Variable]) -> str:
        """Return a name for a value that is computed once, in the outermost block that has all it depends on."""
        scope = self.scope_for(variables)
        for each in self.scopes:
            if key in each.known:
                return each.known[key]
        self.count += 1
        name = f"{prefix}{self.count}"
        scope.lines.append(f"{scope.indent}{name} = {text}")
        scope.known[key] = name
        return name

    # Indices.

    def size(self, symbol: Symbol) -> str:
        return self.sizes.setdefault(symbol, f"size{len(self.sizes)}")

    def index(self, index: Affine, forms: Forms) -> str:
        """Return an index as an expression."""
        parts = []
        for atoms, factor in index.terms:
            factors = [self.atom(atom, forms) for atom in atoms]
            if factor != 1 or not factors:
                factors.insert(0, str(factor))
            parts.append(" * ".join(factors))
        return " + ".join(parts) or "0"

    def atom(self, atom: Atom, forms: Forms) -> str:
        if isinstance(atom, Symbol):
            return self.size(atom)
        if isinstance(atom, Variable):
            return forms[atom]
        assert not isinstance(atom, str)  # sizes by name are in no kernel
        variables = Affine.of(atom).variables
        sign = "//" if isinstance(atom, Quotient) else "%"
        of, by = (self.whole(each, forms) for each in (atom.of, atom.by))
        text = f"{of} {sign} {by}"
        return self.assign((atom, key_of(variables, forms)), "i", text, variables)

    def whole(self, index: Affine, forms: Forms) -> str:
        """Return an index as an operand, in parentheses where it needs them."""
        text = self.index(index, forms)
        single = len(index.terms) == 1 and len(index.terms[0][0]) + (index.terms[0][1] != 1) <= 1
        return text if single and not text.startswith("-") else f"({text})"

    # Terms.

    def value(self, term: Term, forms: Forms) -> str:
        """Return a name, or a number, for a term's value in its own dtype."""
        if isinstance(term, (Statistic, Accumulated)):
            return self.sums[id(term)]
        variables = self.free(term)
        key = id(term), key_of(variables, forms)
        for scope in self.scopes:
            if key in scope.known:
                return scope.known[key]
        if isinstance(term, Load):
            return self.assign(key, "x", self.load(term, forms), variables)
        if isinstance(term, Piecewise):
            one, other = self.value(term.one, forms), self.value(term.other, forms)
            condition = f"{self.index(term.index, forms)} < {self.index(term.bound, forms)}"
            return self.assign(key, "t", f"tl.where({condition}, {one}, {other})", variables)
        return self.assign(key, "t", self.call(term, forms), variables)

    def call(self, term: Call, forms: Forms) -> str:
        args = []
        for place, each in enumerate(term.args):
            if isinstance(each, (int, float)):
                args.append(number_text(each, term.inner))
                continue
            text = self.value(each, forms)
            dtype = dtype_of(each)
            mask = term.function == "where" and place == 0
            args.append(text if dtype == term.inner or mask else f"{text}.to({dtype_text(term.inner)})")
        text = FUNCTIONS[term.function].format(*args)
        if term.dtype == term.inner or term.dtype == torch.bool:
            return text
        return f"({text}).to({dtype_text(term.dtype)})"

    def load(self, term: Load, forms: Forms) -> str:
        variables = variables_of(term.index)
        masks = self.masks(variables, forms)
        guarding: set[Variable] = set()
        for low, high in term.guards:
            masks.append(f"({self.index(low, forms)} < {self.index(high, forms)})")
            guarding |= low.variables | high.variables
        place = self.place(term.array, term.index, forms, guarding - variables)
        return f"tl.load({place}, mask={' & '.join(masks)}, other=0)" if masks else f"tl.load({place})"

    def masks(self, variables: Iterable[Variable], forms: Forms) -> list[str]:
        texts = sorted(forms[variable] for variable in variables)
        return [f"{text}_ok" for text in texts if text != "z" and text not in self.sure]

    def box(self, term: Term, line: Variable, over: Variable) -> tuple[Load, int, int] | None:
        """Return the dimensions of an array that two variables alone run along, if a descriptor may read it.

        Args:
            term: a read of the array.
            line, over: the variables. The second one has to run along the whole of its dimension.

        Returns:
            The read, and the dimensions of ``line`` and ``over``; None if a tile of them is no box.
        """
        if self.style.strides is None or not isinstance(term, Load) or term.guards:
            return None
        places, depths = ([dim for dim, each in enumerate(term.index) if v in each.variables] for v in (line, over))
        if len(places) != 1 or len(depths) != 1 or places == depths or term.array.dtype not in DESCRIBED:
            return None
        # Past the end of an array are zeros, but past that of a part of one is another part.
        (place,), (depth,) = places, depths
        whole = term.index[depth] == Affine.of(over) and term.array.sizes[depth].value == over.size.value
        return (term, place, depth) if whole else None

    def named(self, array: Array) -> str:
        """Return a name for another descriptor of an array."""
        count = sum(each is array for each, _, _ in self.described)
        return f"{self.pointer(array)}_tiles{count or ''}"

    def place(self, array: Array, index: Sequence[Affine], forms: Forms, spread: Iterable[Variable] = ()) -> str:
        """Return the address of an element as text, as a tile over all of ``spread``, too."""
        name = self.pointer(array)
        terms = [f"{text} * 0" for text in sorted(forms[variable] for variable in spread) if text != "z"]
        wide = is_wide(array)
        for dim, each in enumerate(index):
            if each.terms:
                text = self.index(each, forms)
                text = text if len(each.terms) == 1 and not wide else f"({text})"
                terms.append(f"{text}.to(tl.int64) * {name}_{dim}" if wide else f"{text} * {name}_{dim}")
        base = self.assign(("base", array), f"{name}_at", self.base(array), ()) if array.grouped else name
        return " + ".join([base, *terms])

    def pointer(self, array: Array) -> str:
        if array not in self.pointers:
            name, taken = base_of(array).name, set(self.pointers.values())
            views = (name, *(f"{name}{chr(letter)}" for letter in range(ord("a"), ord("z") + 1)))
            self.pointers[array] = next(each for each in views if each not in taken)
        return self.pointers[array]

    def base(self, array: Array) -> str:
        name, cells = self.pointer(array), cells_of(array)
        return f"{name} + {'g' if cells == 1 else f'(g // {cells})'} * {name}_g"

    # Tiles.

    def block(self, name: str) -> str:
        if name not in self.blocks:
            self.blocks.append(name)
        return name

    def counting(self, name: str, form: str, start: str, block: str, size: str) -> None:
        """Print numbers from ``start`` on, as a column or a row, and which of them are below the size.

        Without a size all of them are.
        """
        shape = "[:, None]" if form == "column" else "[None, :]"
        counted = f"tl.arange(0, {self.block(block)}){shape}"
        self.say(f"{name} = {start} + {counted}" if start else f"{name} = {counted}")
        if size:
            self.say(f"{name}_ok = {name} < {size}")
            self.sure.discard(name)
        else:
            self.sure.add(name)

    def tile(self, term: Term, forms: Forms, shape: str, dtype: torch.dtype, whole: set[Variable]) -> str:
        """Return a term as a whole tile."""
        text = self.value(term, forms)
        if dtype_of(term) != dtype:
            text = f"{text}.to({dtype_text(dtype)})"
        return text if self.free(term) >= whole else f"tl.broadcast_to({text}, {shape})"

    def factor(self, term: Term, forms: Forms, shape: str, dtype: torch.dtype, whole: set[Variable], mask: str) -> str:
        """Return a factor of a product, which is 0 where its variable has no value."""
        text = self.tile(term, forms, shape, dtype, whole)
        loaded = isinstance(term, Load) and variables_of(term.index) >= whole
        return text if loaded else f"tl.where({mask}, {text}, 0)"

    def dot(self, left: str, right: str, added: str | None, dtype: torch.dtype) -> str:
        """Return a product of tiles, plus ``added`` if it is given."""
        if dtype == torch.bfloat16 and self.style.interpreted:
            left, right = (f"{each}.to(tl.float32)" for each in (left, right))
        precise = ', input_precision="ieee"' if dtype == torch.float32 else ""
        wide = f", out_dtype={dtype_text(widened(dtype))}"
        return f"tl.dot({left}, {right}{f', {added}' if added else ''}{precise}{wide})"

    def source(self, name: str, lines: Sequence[str]) -> KernelSource:
        written = self.kernel.written
        for each in written:
            self.pointer(each)
        read = [array for array in self.pointers if array not in written]
        pointers = (*read, *written)
        params: list[list[str]] = []
        for array in pointers:
            own = self.pointers[array]
            params.append([own, *([f"{own}_g"] if array.grouped else [])])
            params[-1] += [f"{own}_{dim}" for dim in range(len(array.sizes))]
        params += [[text] for text in self.sizes.values()]
        params += [["cells"]] if self.persistent else []
        head = [f"def {name}("]
        head += [f"    {', '.join(each)}," for each in params]
        head += [f"    {block}: tl.constexpr," for block in self.blocks]
        head += ["):", *(f"    # {line}" for line in covered(self.kernel))]
        text = "\n".join([*head, *lines, ""])
        names = tuple(each for several in params for each in several)
        return KernelSource(
            *(name, text, pointers, tuple(self.sizes), names, tuple(self.blocks), len(written)),
            *(self.persistent, tuple(dict.fromkeys((array, along) for array, along, _ in self.described))),
        )
