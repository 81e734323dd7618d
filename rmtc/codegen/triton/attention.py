"""Print kernels of attention."""

from __future__ import annotations

import math

import torch

from rmtc.affine import Affine, Variable, variables_of
from rmtc.codegen.triton.printer import Printer, Scope
from rmtc.codegen.triton.spelling import Forms, dtype_of, dtype_text, is_wide, number_text, widened
from rmtc.ir.kernel import Attend
from rmtc.ir.terms import Term


class AttentionPrinter(Printer):
    """Prints a kernel that goes over blocks of keys for a tile of queries, with a running softmax."""

    def attention(self, kernel: Attend) -> list[str]:
        dtype, wide, causal = kernel.array.dtype, widened(kernel.array.dtype), kernel.array.causal
        self.say("g = tl.program_id(1).to(tl.int64)")
        self.say("z = tl.program_id(2)")
        self.say(f"m_size = {self.index(kernel.m.size, {})}")
        self.say(f"n_size = {self.index(kernel.n.size, {})}")
        # The rows that see most keys are begun first.
        self.say(f"m_tile = {'tl.num_programs(0) - 1 - ' if causal else ''}tl.program_id(0)")
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
        # Blocks of keys that all rows see need no mask. The others come last.
        self.say(f"whole = {'tl.minimum(n_size, m_tile * BLOCK_M)' if causal else 'n_size'} // BLOCK_N * BLOCK_N")
        end = "tl.minimum(n_size, (m_tile + 1) * BLOCK_M)" if causal else "n_size"
        for begin, last, whole in (("0", "whole", True), ("whole", end, False)):
            lines = self.attended(kernel, base, whole)
            self.say(f"for n_from in range({begin}, {last}, BLOCK_N):")
            self.scopes[-1].lines += lines
        self.say("found = acc / tl.where(total == 0, 1, total)")
        spread = {kernel.m, kernel.d} - variables_of(kernel.index)
        place = self.place(kernel.array, kernel.index, {**base, kernel.d: "d"}, spread)
        self.say(f"tl.store({place}, found, mask=m_ok & d_ok)")
        return self.scopes[0].lines

    def attended(self, kernel: Attend, base: Forms, whole: bool) -> list[str]:
        """Print what is done for a block of keys.

        Args:
            kernel: the kernel.
            base: the forms of the variables that are fixed in a tile, and of its rows.
            whole: whether all keys of the block exist, and a causal row sees all of them.
        """
        dtype, wide, mask = kernel.array.dtype, widened(kernel.array.dtype), kernel.mask
        body = Scope(f"{self.scopes[-1].indent}    ", frozenset({kernel.n}))
        self.scopes.append(body)
        self.counting("n", "row", "n_from", "BLOCK_N", "" if whole else "n_size")
        self.counting("nt", "column", "n_from", "BLOCK_N", "" if whole else "n_size")
        # Scores are exponents of 2, in units of `unit`, which has the sign of the scale.
        unit = number_text(kernel.array.scale * math.log2(math.e), wide)
        key = self.boxed(kernel.key, kernel.n, kernel.e)
        if key is not None:
            key = f"{key}.T"
        else:
            forms = {**base, kernel.e: "et", kernel.n: "n"}
            seen = "et_ok" if whole else "et_ok & n_ok"
            key = self.factor(kernel.key, forms, "(BLOCK_E, BLOCK_N)", dtype, {kernel.e, kernel.n}, seen)
        self.say(f"score = {self.dot('query', key, None, dtype)}")
        masks = [] if whole else ["n_ok", *(["(n <= m)"] if kernel.array.causal else [])]
        if mask is not None and dtype_of(mask) == torch.bool:
            masks.append(self.value(mask, {**base, kernel.n: "n"}))
        if kernel.array.scale <= 0 or (mask is not None and dtype_of(mask) != torch.bool):
            self.say(f"score = score * {unit}")
            unit = ""
            if mask is not None and dtype_of(mask) != torch.bool:
                added = self.value(mask, {**base, kernel.n: "n"})
                self.say(f"score += {added}.to({dtype_text(wide)}) * {number_text(math.log2(math.e), wide)}")
        if masks:
            self.say(f"score = tl.where({' & '.join(masks)}, score, float('-inf'))")
        self.say("highest = tl.maximum(top, tl.max(score, 1, keep_dims=True))")
        shift = "highest"
        if masks or mask is not None:
            self.say("shift = tl.where(highest == float('-inf'), 0, highest)  # of a row that has seen nothing yet")
            shift = "shift"
        scaled = f" * {unit}" if unit else ""
        self.say(f"weight = tl.exp2(score{scaled} - {shift}{scaled})")
        self.say(f"decay = tl.exp2(top{scaled} - {shift}{scaled})")
        self.say("total = total * decay + tl.sum(weight, 1, keep_dims=True)")
        value = self.boxed(kernel.value, kernel.n, kernel.d)
        if value is None:
            forms = {**base, kernel.n: "nt", kernel.d: "d"}
            seen = "d_ok" if whole else "nt_ok & d_ok"
            value = self.factor(kernel.value, forms, "(BLOCK_N, BLOCK_D)", dtype, {kernel.n, kernel.d}, seen)
        given = "weight" if wide == dtype else f"weight.to({dtype_text(dtype)})"
        self.say(f"acc = {self.dot(given, value, 'acc * decay', dtype)}")
        self.say("top = highest")
        self.scopes.pop()
        return body.lines

    def boxed(self, term: Term, rows: Variable, columns: Variable) -> str | None:
        """Print the read of keys or values by a descriptor of a head's own matrix, and return it.

        Args:
            term: the keys or values.
            rows, columns: the variables of their positions and of their features.

        Returns:
            The read, or None if no descriptor reads them.
        """
        found = self.box(term, rows, columns)
        if found is None or self.style.strides is None or self.box(term, columns, rows) is None:
            return None
        read, place, depth = found
        array, strides = read.array, self.style.strides(read.array)
        if is_wide(array) or strides[depth] != 1:
            return None
        if not strides[place] or any(
            stride * array.dtype.itemsize % 16 for dim, stride in enumerate(strides) if dim != depth
        ):
            return None
        others = tuple(Affine() if dim in (place, depth) else each for dim, each in enumerate(read.index))
        key = array, depth, others  # keys and values may be parts of one array
        name = self.described.get(key)
        if name is None:
            name = self.described[key] = self.named(array)
            at = self.place(array, others, {self.kernel.z: "z"})
            sizes = ", ".join(self.index(array.sizes[dim], {}) for dim in (place, depth))
            blocks = ", ".join(self.block(f"BLOCK_{each.name.upper()}") for each in (rows, columns))
            made = f"[{sizes}], [{self.pointer(array)}_{place}, 1], [{blocks}]"
            outer = self.scopes[0]
            outer.lines.append(f"{outer.indent}{name} = tl.make_tensor_descriptor({at}, {made})")
        return f"{name}.load([n_from, 0])"
