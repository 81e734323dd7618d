"""The printer of kernels as Triton source."""

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
    name_of,
    number_text,
    widened,
)
from rmtc.codegen.triton.style import DESCRIBED, EACH_TILE, ONCE, ONE_TILE, TILE, TILES, KernelSource, Style
from rmtc.ir.array import Array, base_of
from rmtc.ir.kernel import Attend, Kernel
from rmtc.ir.terms import Accumulated, Call, Load, Piecewise, Statistic, Term, free_variables


def source_of(kernel: Kernel | Attend, prefix: str, style: Style) -> KernelSource:
    """Print a kernel.

    Args:
        kernel: the kernel.
        prefix: what its name begins with.
        style: the style of its products.
    """
    printer = _Printer(kernel, style)
    lines = printer.attention(kernel) if isinstance(kernel, Attend) else printer.product(kernel)
    return printer.source(name_of(kernel, prefix), lines)


@dataclass
class _Scope:
    """A block of statements.

    Attributes:
        indent: the white space before each statement.
        own: the variables that exist only inside of it.
    """

    indent: str
    own: frozenset[Variable]
    lines: list[str] = field(default_factory=list)
    known: dict[object, str] = field(default_factory=dict)


class _Printer:
    def __init__(self, kernel: Kernel | Attend, style: Style) -> None:
        self.kernel, self.style = kernel, style
        self.persistent = style.persistent and isinstance(kernel, Kernel)
        self.head: list[str] = []
        self.described: dict[tuple[Array, int], str] = {}
        self.free = free_variables()
        self.pointers: dict[Array, str] = {}
        self.sizes: dict[Symbol, str] = {}
        self.scopes = [_Scope("        " if self.persistent else "    ", frozenset())]
        self.count = 0
        self.blocks: list[str] = []
        self.sums: dict[int, str] = {}

    # Statements.

    def say(self, line: str) -> None:
        self.scopes[-1].lines.append(f"{self.scopes[-1].indent}{line}")

    def scope_for(self, variables: Iterable[Variable]) -> _Scope:
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
        return [f"{text}_ok" for text in texts if text != "z"]

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

    # Kernels.

    def block(self, name: str) -> str:
        if name not in self.blocks:
            self.blocks.append(name)
        return name

    def counting(self, name: str, form: str, start: str, block: str, size: str) -> None:
        """Print numbers from ``start`` on, as a column or a row, and which of them are below the size."""
        shape = "[:, None]" if form == "column" else "[None, :]"
        counted = f"tl.arange(0, {self.block(block)}){shape}"
        self.say(f"{name} = {start} + {counted}" if start else f"{name} = {counted}")
        self.say(f"{name}_ok = {name} < {size}")

    def product(self, kernel: Kernel) -> list[str]:
        forms = {kernel.z: "z", kernel.m: "m", kernel.n: "n"}
        sizes = [f"{each}_size = {self.index(getattr(kernel, each).size, {})}" for each in "mn"]
        if self.persistent:
            sizes += [f"z_size = {self.index(kernel.z.size, {})}", *TILES]
            self.head += [f"    {line}" for line in sizes]
            for line in TILE:
                self.say(line)
        else:
            for line in ("g = tl.program_id(1).to(tl.int64)", "z = tl.program_id(2)", *sizes, *ONE_TILE):
                self.say(line)
        self.counting("m", "column", "m_tile * BLOCK_M", "BLOCK_M", "m_size")
        self.counting("n", "row", "n_tile * BLOCK_N", "BLOCK_N", "n_size")
        for stage in kernel.stages:
            self.stage(stage.over, stage.statistics, stage.accumulators, forms)
        # All values are read before the first store, which may overwrite an operand.
        values = [self.value(output.term, forms) for output in kernel.outputs]
        for output, value in zip(kernel.outputs, values, strict=True):
            array = output.array
            variables = variables_of(output.index)
            whole = kernel.n in variables
            spread = {kernel.m} - variables
            masks = ["m_ok", "n_ok"] if whole else [self.assign("once", "once", ONCE, ())]
            place = self.place(array, output.index, forms, spread)
            self.say(f"tl.store({place}, {value}, mask={' & '.join(masks)})")
        if self.persistent:
            self.head.append(f"    {EACH_TILE}")
        return [*self.head, *self.scopes[0].lines]

    def stage(
        self, over: Variable, statistics: Sequence[Statistic], accumulators: Sequence[Accumulated], forms: Forms
    ) -> None:
        names: list[tuple[Statistic | Accumulated, str]] = []
        for each in statistics:
            start = "float('-inf')" if each.array.kind == "max" else "0"
            self.count += 1
            names.append((each, f"{each.array.kind}{self.count}"))
            self.say(f"{names[-1][1]} = tl.full((BLOCK_M, 1), {start}, {dtype_text(each.array.inner)})")
        for product in accumulators:
            self.count += 1
            names.append((product, f"acc{self.count}"))
            self.say(f"{names[-1][1]} = tl.zeros((BLOCK_M, BLOCK_N), {dtype_text(widened(product.array.dtype))})")
        rows, columns = {**forms, over: "k"}, {**forms, over: "kt"}
        body = _Scope(f"{self.scopes[-1].indent}    ", frozenset({over}))
        self.scopes.append(body)
        size = self.index(over.size, forms)
        self.counting("k", "row", "k_from", "BLOCK_K", size)
        if accumulators:
            self.counting("kt", "column", "k_from", "BLOCK_K", size)
        for term, name in names:
            if isinstance(term, Statistic):
                value = self.tile(term.term, rows, "(BLOCK_M, BLOCK_K)", term.array.inner, {self.kernel.m, over})
                if term.array.kind == "max":
                    highest = f"tl.max(tl.where(k_ok, {value}, float('-inf')), 1, keep_dims=True)"
                    self.say(f"{name} = tl.maximum({name}, {highest})")
                else:
                    self.say(f"{name} += tl.sum(tl.where(k_ok, {value}, 0), 1, keep_dims=True)")
                continue
            dtype = term.array.dtype
            left = self.tiled(term.left, self.kernel.m, over) or self.factor(
                term.left, rows, "(BLOCK_M, BLOCK_K)", dtype, {self.kernel.m, over}, "k_ok"
            )
            right = self.tiled(term.right, self.kernel.n, over) or self.factor(
                term.right, columns, "(BLOCK_K, BLOCK_N)", dtype, {self.kernel.n, over}, "kt_ok"
            )
            self.say(f"{name} = {self.dot(left, right, name, dtype)}")
        self.scopes.pop()
        # Values that are invariant in the loop were printed before it.
        self.say(f"for k_from in range(0, {size}, BLOCK_K):")
        self.scopes[-1].lines += body.lines
        for term, name in names:
            dtype = term.array.dtype
            inner = term.array.inner if isinstance(term, Statistic) else widened(dtype)
            if inner != dtype:
                self.count += 1
                self.say(f"t{self.count} = {name}.to({dtype_text(dtype)})")
                name = f"t{self.count}"
            self.sums[id(term)] = name

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

    def tiled(self, term: Term, line: Variable, over: Variable) -> str | None:
        """Print the read of a factor by a descriptor, and return its name.

        Args:
            term: the factor.
            line: the variable of the product's rows, or columns.
            over: the variable that is summed over.

        Returns:
            The name, or None if a tile of the factor is no box that a descriptor reads.
        """
        if (
            self.style.strides is None
            or not isinstance(term, Load)
            or term.guards
            or self.kernel.z in variables_of(term.index)
        ):
            return None
        array, strides = term.array, self.style.strides(term.array)
        places = [dim for dim, each in enumerate(term.index) if line in each.variables]
        depths = [dim for dim, each in enumerate(term.index) if over in each.variables]
        others = [each for dim, each in enumerate(term.index) if dim not in (*places, *depths)]
        if len(places) != 1 or len(depths) != 1 or places == depths or any(each.terms for each in others):
            return None
        place, depth = places[0], depths[0]
        start = term.index[place] - Affine.of(line)
        if start.variables or term.index[depth] != Affine.of(over) or array.sizes[depth].value != over.size.value:
            return None  # a box reads zeros past the array's end, but not past a part's
        along = depth if strides[depth] == 1 else place
        across = place if along == depth else depth
        size = array.dtype.itemsize
        if strides[along] != 1 or strides[across] * size % 16 or array.dtype not in DESCRIBED:
            return None
        block = f"BLOCK_{line.name.upper()}"
        name = self.described.get((array, along))
        if name is None:
            name = self.described[array, along] = f"{self.pointer(array)}_tiles"
            cells = cells_of(array)
            lead = [["cells" if cells == 1 else f"cells // {cells}"], [f"{self.pointer(array)}_g"], ["1"]]
            shape, pace, box = lead if array.grouped else [[], [], []]
            for dim in (across, along):
                shape.append(self.index(array.sizes[dim], {}))
                pace.append("1" if dim == along else f"{self.pointer(array)}_{dim}")
                box.append(self.block(block if dim == place else "BLOCK_K"))
            made = ", ".join(f"[{', '.join(each)}]" for each in (shape, pace, box))
            self.head.append(f"    {name} = tl.make_tensor_descriptor({self.pointer(array)}, {made})")
        at = {place: f"{line.name}_tile * {block}", depth: "k_from"}
        if start.terms:
            at[place] += f" + {self.index(start, {})}"
        corner = [at[across], at[along]]
        if array.grouped:
            corner.insert(0, "g.to(tl.int32)" if cells_of(array) == 1 else f"(g // {cells_of(array)}).to(tl.int32)")
        self.count += 1
        tile = f"x{self.count}"
        boxes = {place: block, depth: "BLOCK_K"}
        shaped = f".reshape({boxes[across]}, {boxes[along]})" if array.grouped else ""
        # Rows of the left factor come first, columns of the right one last.
        turned = ".T" if (along == place) == (line is self.kernel.m) else ""
        self.say(f"{tile} = {name}.load([{', '.join(corner)}]){shaped}{turned}")
        return tile

    def attention(self, kernel: Attend) -> list[str]:
        dtype, wide = kernel.array.dtype, widened(kernel.array.dtype)
        self.say("g = tl.program_id(1).to(tl.int64)")
        self.say("z = tl.program_id(2)")
        self.say(f"m_size = {self.index(kernel.m.size, {})}")
        self.say(f"n_size = {self.index(kernel.n.size, {})}")
        self.say("m_tile = tl.program_id(0)")
        self.counting("m", "column", "m_tile * BLOCK_M", "BLOCK_M", "m_size")
        self.counting("e", "row", "", "BLOCK_E", self.index(kernel.e.size, {}))
        self.counting("et", "column", "", "BLOCK_E", self.index(kernel.e.size, {}))
        self.counting("d", "row", "", "BLOCK_D", self.index(kernel.d.size, {}))
        base = {kernel.z: "z", kernel.m: "m"}
        forms = {**base, kernel.e: "e"}
        query = self.factor(kernel.query, forms, "(BLOCK_M, BLOCK_E)", dtype, {kernel.m, kernel.e}, "e_ok")
        self.say(f"query = {query}")
        self.say(f"top = tl.full((BLOCK_M, 1), float('-inf'), {dtype_text(wide)})")
        self.say(f"total = tl.zeros((BLOCK_M, 1), {dtype_text(wide)})")
        self.say(f"acc = tl.zeros((BLOCK_M, BLOCK_D), {dtype_text(wide)})")
        end = "tl.minimum(n_size, (m_tile + 1) * BLOCK_M)" if kernel.array.causal else "n_size"
        body = _Scope(f"{self.scopes[-1].indent}    ", frozenset({kernel.n}))
        self.scopes.append(body)
        self.counting("n", "row", "n_from", "BLOCK_N", "n_size")
        self.counting("nt", "column", "n_from", "BLOCK_N", "n_size")
        forms = {**base, kernel.e: "et", kernel.n: "n"}
        key = self.factor(kernel.key, forms, "(BLOCK_E, BLOCK_N)", dtype, {kernel.e, kernel.n}, "et_ok & n_ok")
        self.say(f"score = {self.dot('query', key, None, dtype)} * {number_text(kernel.array.scale, wide)}")
        seen = "n_ok & (n <= m)" if kernel.array.causal else "n_ok"
        if kernel.mask is not None:
            mask = self.value(kernel.mask, {**base, kernel.n: "n"})
            if dtype_of(kernel.mask) == torch.bool:
                seen = f"{seen} & {mask}"
            else:
                self.say(f"score += {mask}.to({dtype_text(wide)})")
        self.say(f"score = tl.where({seen}, score, float('-inf'))")
        self.say("highest = tl.maximum(top, tl.max(score, 1, keep_dims=True))")
        self.say("shift = tl.where(highest == float('-inf'), 0, highest)  # of a row that has seen nothing yet")
        self.say("weight = tl.exp(score - shift)")
        self.say("decay = tl.exp(top - shift)")
        self.say("total = total * decay + tl.sum(weight, 1, keep_dims=True)")
        forms = {**base, kernel.n: "nt", kernel.d: "d"}
        value = self.factor(kernel.value, forms, "(BLOCK_N, BLOCK_D)", dtype, {kernel.n, kernel.d}, "nt_ok & d_ok")
        given = "weight" if wide == dtype else f"weight.to({dtype_text(dtype)})"
        self.say(f"acc = {self.dot(given, value, 'acc * decay', dtype)}")
        self.say("top = highest")
        self.scopes.pop()
        self.say(f"for n_from in range(0, {end}, BLOCK_N):")
        self.scopes[-1].lines += body.lines
        self.say("found = acc / tl.where(total == 0, 1, total)")
        place = self.place(kernel.array, kernel.index, {**base, kernel.d: "d"})
        self.say(f"tl.store({place}, found, mask=m_ok & d_ok)")
        return self.scopes[0].lines

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
            *(self.persistent, tuple(self.described)),
        )
