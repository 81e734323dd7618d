"""Print kernels of products and of sums over rows."""

from __future__ import annotations

from collections.abc import Sequence

from rmtc.affine import Affine, Variable, variables_of
from rmtc.codegen.triton.printer import Printer, Scope
from rmtc.codegen.triton.spelling import Forms, cells_of, dtype_text, widened
from rmtc.codegen.triton.style import EACH_TILE, ONCE, ONE_TILE, TILE, TILES
from rmtc.ir.kernel import Kernel
from rmtc.ir.terms import Accumulated, Statistic, Term


class ProductPrinter(Printer):
    """Prints a kernel that computes a tile of rows and columns, after loops over other variables."""

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
        body = Scope(f"{self.scopes[-1].indent}    ", frozenset({over}))
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

    def tiled(self, term: Term, line: Variable, over: Variable) -> str | None:
        """Print the read of a factor by a descriptor, and return its name.

        Args:
            term: the factor.
            line: the variable of the product's rows, or columns.
            over: the variable that is summed over.

        Returns:
            The name, or None if a tile of the factor is no box that a descriptor reads.
        """
        found = self.box(term, line, over)
        if found is None or self.style.strides is None or self.kernel.z in variables_of(found[0].index):
            return None
        read, place, depth = found
        array, strides = read.array, self.style.strides(read.array)
        others = [each for dim, each in enumerate(read.index) if dim not in (place, depth)]
        start = read.index[place] - Affine.of(line)
        if start.variables or any(each.terms for each in others):
            return None
        along = depth if strides[depth] == 1 else place
        across = place if along == depth else depth
        size = array.dtype.itemsize
        if strides[along] != 1 or strides[across] * size % 16:
            return None
        block = f"BLOCK_{line.name.upper()}"
        key = array, along, block
        name = self.described.get(key)
        if name is None:
            name = self.described[key] = self.named(array)
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
