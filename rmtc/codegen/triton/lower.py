"""A body's operations as arrays that are functions of their indices."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from rmtc.codegen.fused import add_linear, add_matmul, rms_normalize, roll_products, rotary
from rmtc.codegen.torch.rules import Arguments
from rmtc.errors import VerifyError
from rmtc.ir.array import (
    Array,
    Attention,
    Indices,
    Joined,
    Nest,
    Outside,
    Pointwise,
    Product,
    Reduction,
    Stored,
    View,
)
from rmtc.ir.index import Index, Symbol, product_of
from rmtc.ir.program import call_arguments, leaves, map_leaves
from rmtc.ir.segment_loop import BodyOp, Environment, Fit
from rmtc.ir.wavefront import Input, Local, Number, Weight, choose

__all__ = ["Given", "copied", "lower"]

aten = torch.ops.aten

Scalar: TypeAlias = int | float | bool
A = TypeVar("A", bound=Array)
Rule: TypeAlias = "Callable[[_Lowering, Arguments], Array | None]"


class _Unlowered(Exception):
    """An operation that no kernel computes."""


class _Size(int):
    """An integer that other calls may have another of."""


class Given(NamedTuple):
    """An operand of a body.

    Attributes:
        meta: the tensor of a cell, on ``meta``; of a number that differs from cell to cell, such a number.
        grouped: whether each cell has one of its own.
        cells: how many neighbouring cells have each.
    """

    meta: Any
    grouped: bool
    cells: int = 1


def lower(
    name: str,
    ops: Mapping[int, BodyOp],
    results: Sequence[int],
    environment: Environment,
    given: Callable[[Any], Given],
) -> Nest:
    """A body as arrays.

    Args:
        name: of the body.
        ops: operations by number, in order.
        results: the numbers of those whose values are returned.
        environment: the sizes for the functions of batch and length in the operations.
        given: for an operand that is no other operation of the body, what it is.
    """
    return _Lowering(name, environment, given).nest(ops, results)


def copied(array: Array) -> Array:
    """The same in memory of its own."""
    return Pointwise(array.name, array.sizes, array.dtype, array.grouped, array.ops, "cast", (array,), array.dtype)


class _Lowering:
    def __init__(self, name: str, environment: Environment, given: Callable[[Any], Given]) -> None:
        self.name, self.environment, self.given = name, environment, given
        self.arrays: list[Array] = []
        self.operands: dict[Any, Array] = {}
        self.op: BodyOp | None = None
        self.label = ""
        self.values: dict[int, Any] = {}
        self.numbers: dict[Array, Any] = {}

    def nest(self, ops: Mapping[int, BodyOp], results: Sequence[int]) -> Nest:
        for number, op in ops.items():
            self.op, self.label = op, f"v{number}"
            self.values[number] = self._run(op)
        return Nest(self.name, tuple(self.arrays), self.operands, tuple(self.values[number] for number in results))

    def _run(self, op: BodyOp) -> Any:
        args = map_leaves(op.args, self._operand)
        if op.target is operator.getitem:
            return args[0][args[1]]
        if op.target is choose:
            return self.pointwise("where", self.compare("ne", args[0], 0), *args[1:])
        if not isinstance(op.target, torch._ops.OpOverload):  # a shared value as a result
            return args[0]
        positional, named = call_arguments(args)
        arguments = Arguments(op.target, positional, named)
        rule = _RULES.get(op.target)
        first = positional[0] if positional else None
        if isinstance(first, Array) and not first.sizes and any(name.startswith("dim") for name in arguments.values):
            rule = None  # a dimension of what has none
        metas = map_leaves(op.args, lambda leaf: self._meta(self._operand(leaf)))
        positional, named = call_arguments(metas)
        wanted = op.target(*positional, **named)
        count, made = len(self.arrays), None
        if rule is not None and isinstance(wanted, torch.Tensor):
            with contextlib.suppress(_Unlowered):
                made = rule(self, arguments)
        if made is not None and made.dtype != wanted.dtype:
            made = self.cast(made, wanted.dtype)
        if made is None:
            del self.arrays[count:]
            return self._outside(op, args, wanted)
        if made.shape != tuple(wanted.shape):
            raise VerifyError(f"{op} is lowered to {made.shape} in place of {tuple(wanted.shape)}")
        return made

    def _outside(self, op: BodyOp, args: tuple[Any, ...], wanted: Any) -> Any:
        """What torch runs, on what is in memory, a row for each cell."""

        def there(leaf: Any) -> Any:
            spread = isinstance(leaf, Stored) and leaf.cells > 1
            return self.add(copied(leaf)) if isinstance(leaf, View) or spread else leaf

        args = map_leaves(args, there)
        call = replace(op, args=args)
        read = [each for each in leaves(args) if isinstance(each, Array)]
        grouped = any(each.grouped for each in read)
        several = not isinstance(wanted, torch.Tensor)
        found = [
            self.add(
                Outside(
                    f"{self.label}_{n}" if several else self.label,
                    self.sizes(each.shape, *read),
                    each.dtype,
                    grouped,
                    (op,),
                    call,
                    n if several else None,
                )
            )
            for n, each in enumerate(wanted if several else (wanted,))
        ]
        return tuple(found) if several else found[0]

    def _operand(self, leaf: Any) -> Any:
        """A leaf of an operation's arguments: an array, or a constant."""
        if isinstance(leaf, Local):
            return self.values[leaf.number]
        if isinstance(leaf, Fit):
            return _Size(leaf.at(self.environment))
        if not isinstance(leaf, tuple) and not _is_operand(leaf):
            return leaf
        if leaf not in self.operands:
            meta, grouped, cells = self.given(leaf)
            named = isinstance(leaf, (Input, Weight, Number))
            name = (
                str(leaf)
                if named
                else f"u{sum(not isinstance(each, (Input, Weight, Number)) for each in self.operands)}"
            )
            wide = torch.float64 if isinstance(meta, float) else None
            tensor = meta if isinstance(meta, torch.Tensor) else torch.tensor(meta, dtype=wide, device="meta")
            fixed = isinstance(leaf, Weight)
            sizes = tuple(Index.of(size if fixed or size == 1 else Symbol(size)) for size in tensor.shape)
            found = self.operands[leaf] = self.add(Stored(name, sizes, tensor.dtype, grouped, (), cells))
            if isinstance(leaf, Number):
                self.numbers[found] = meta
        return self.operands[leaf]

    def _meta(self, value: Any) -> Any:
        if isinstance(value, Array):
            if value in self.numbers:
                return self.numbers[value]
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, tuple):
            return tuple(map(self._meta, value))
        return torch.device("meta") if isinstance(value, torch.device) else value

    def add(self, array: A) -> A:
        self.arrays.append(array)
        return array

    # Arrays of arrays.

    def sizes(self, shape: Iterable[int], *sources: Array) -> Indices:
        """Sizes as indices: those of the sources where they are equal, fixed ones first."""
        known = [size for source in sources for size in source.sizes]
        fixed = {size.value for size in known if size.fixed}
        found = []
        for value in shape:
            alike = next((size for size in known if size.value == value and not size.fixed), None)
            if alike is None or (value in fixed and not isinstance(value, _Size)):
                alike = Index.of(Symbol(int(value))) if isinstance(value, _Size) and value > 1 else Index.of(int(value))
            found.append(alike)
        return tuple(found)

    def cast(self, array: Array, dtype: torch.dtype) -> Array:
        return array if array.dtype == dtype else self._pointwise("cast", (array,), dtype, dtype)

    def pointwise(self, function: str, *args: Array | Scalar) -> Array:
        """A function of arrays in the dtype that torch gives to it."""
        found: torch.dtype = _promoted(args[1:] if function == "where" else args)
        if found == torch.bool and function not in ("and", "or", "xor", "where", "not"):
            raise _Unlowered
        return self._pointwise(function, args, found, _inner(found))

    def compare(self, function: str, *args: Array | Scalar) -> Array:
        return self._pointwise(function, args, torch.bool, _inner(_promoted(args)))

    def _pointwise(
        self, function: str, args: tuple[Array | Scalar, ...], dtype: torch.dtype, inner: torch.dtype
    ) -> Array:
        arrays = [each for each in args if isinstance(each, Array)]
        shape = torch.broadcast_shapes(*(each.shape for each in arrays))
        sizes = []
        for place, value in enumerate(reversed(shape)):
            known = [each.sizes[-1 - place] for each in arrays if len(each.sizes) > place]
            alike = [size for size in known if size.value == value]
            sizes.append(next((size for size in alike if size.fixed), alike[0]))
        grouped = any(each.grouped for each in arrays)
        return self.add(
            Pointwise(self.label, tuple(reversed(sizes)), dtype, grouped, self._ops, function, tuple(args), inner)
        )

    @property
    def _ops(self) -> tuple[BodyOp, ...]:
        return (self.op,) if self.op is not None else ()

    def view(
        self,
        source: Array,
        sizes: Indices,
        at: Callable[[Indices], Indices],
        view: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Array:
        return self.add(View(self.label, sizes, source.dtype, source.grouped, self._ops, source, at, view))

    def reduce(self, kind: str, source: Array, dims: Iterable[int], keep: bool) -> Array:
        """A reduction in the dtype of the source, or wider within."""
        reduced = tuple(sorted(dim % len(source.sizes) for dim in dims))
        one = Index.of(1)
        sizes = tuple(
            one if dim in reduced else size for dim, size in enumerate(source.sizes) if keep or dim not in reduced
        )
        inner = _inner(source.dtype)
        return self.add(
            Reduction(self.label, sizes, source.dtype, source.grouped, self._ops, kind, source, reduced, keep, inner)
        )

    def mean(self, source: Array, dims: Sequence[int], keep: bool) -> Array:
        wide = self.cast(source, _inner(source.dtype))
        count = 1
        for dim in dims:
            count *= source.shape[dim]
        return self.pointwise("div", self.reduce("sum", wide, dims, keep), float(count))

    def reshape(self, source: Array, shape: Sequence[int]) -> Array:
        """Another shape with the elements in the same order."""
        total = 1
        for size in source.shape:
            total *= size
        known = 1
        for size in shape:
            known *= size if size != -1 else 1
        whole = [size if size != -1 else total // max(1, known) for size in shape]
        sizes = self.sizes(whole, source)
        lead = int(source.grouped)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(*tensor.shape[:lead], *map(int, whole))

        return self.view(source, sizes, partial(_reshaped, source.sizes, sizes), view)

    def transpose(self, source: Array, *order: int) -> Array:
        """Dimension n is what was ``order[n]``."""
        lead = int(source.grouped)
        back = sorted(range(len(order)), key=order.__getitem__)
        return self.view(
            source,
            tuple(source.sizes[dim] for dim in order),
            lambda index: tuple(index[place] for place in back),
            lambda tensor: tensor.permute(*range(lead), *(dim + lead for dim in order)),
        )

    def swap(self, source: Array, one: int, other: int) -> Array:
        order = list(range(len(source.sizes)))
        order[one], order[other] = order[other], order[one]
        return self.transpose(source, *order)

    def unsqueeze(self, source: Array, dim: int) -> Array:
        place = dim % (len(source.sizes) + 1)
        lead = int(source.grouped)
        return self.view(
            source,
            (*source.sizes[:place], Index.of(1), *source.sizes[place:]),
            lambda index: (*index[:place], *index[place + 1 :]),
            lambda tensor: tensor.unsqueeze(place + lead),
        )

    def select(self, source: Array, dim: int, index: Index) -> Array:
        place, lead = dim % len(source.sizes), int(source.grouped)
        return self.view(
            source,
            (*source.sizes[:place], *source.sizes[place + 1 :]),
            lambda each: (*each[:place], index, *each[place:]),
            lambda tensor: tensor.select(place + lead, index.value),
        )

    def slice(self, source: Array, dim: int, start: Index, length: Index, step: int = 1) -> Array:
        place, lead = dim % len(source.sizes), int(source.grouped)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            end = start.value + (length.value - 1) * step + 1
            found: torch.Tensor = aten.slice.Tensor(tensor, place + lead, start.value, max(start.value, end), step)
            return found

        return self.view(
            source,
            (*source.sizes[:place], length, *source.sizes[place + 1 :]),
            lambda index: (*index[:place], index[place] * step + start, *index[place + 1 :]),
            view,
        )

    def expand(self, source: Array, sizes: Sequence[int]) -> Array:
        new = len(sizes) - len(source.sizes)
        lead = int(source.grouped)
        full = [source.shape[dim - new] if dim >= new and size == -1 else size for dim, size in enumerate(sizes)]
        repeated = [dim for dim, size in enumerate(source.shape) if size == 1]

        def at(index: Indices) -> Indices:
            return tuple(Index() if dim in repeated else each for dim, each in enumerate(index[new:]))

        def view(tensor: torch.Tensor) -> torch.Tensor:
            shaped = tensor.view(*tensor.shape[:lead], *(1,) * new, *tensor.shape[lead:]) if new else tensor
            return shaped.expand(*tensor.shape[:lead], *map(int, full))

        return self.view(source, self.sizes(full, source), at, view)

    def product(self, left: Array, right: Array) -> Array:
        """``left @ right`` of matrices; of a single row or column, a sum."""
        if left.shape[-1] == 1 or 1 in (left.shape[-2], right.shape[-1]):
            inner = _inner(left.dtype)
            column = right.shape[-1] == 1 and left.shape[-1] > 1
            if left.shape[-1] == 1:
                return self.pointwise("mul", left, right)
            one = left if column else self.swap(left, -1, -2)
            other = self.swap(right, -1, -2) if column else right
            terms = self._pointwise("mul", (one, other), inner, inner)
            return self.cast(self.reduce("sum", terms, [-1 if column else -2], True), left.dtype)
        if not left.dtype.is_floating_point:
            raise _Unlowered
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        sizes = (*self.sizes(batch, left, right), left.sizes[-2], right.sizes[-1])
        grouped = left.grouped or right.grouped
        return self.add(Product(self.label, sizes, left.dtype, grouped, self._ops, left, right))


def _is_operand(leaf: Any) -> bool:
    return type(leaf).__module__ in ("rmtc.ir.wavefront", "rmtc.ir.segment_loop", "rmtc.ir.program")


def _promoted(args: Iterable[Array | Scalar]) -> torch.dtype:
    """The dtype that torch gives to a pointwise operation; a number by cell counts as a Python number."""
    values = [
        torch.empty(each.shape if not _scalar(each) else (), dtype=each.dtype, device="meta")
        if isinstance(each, Array)
        else each
        for each in args
    ]
    found = values[0]
    if len(values) == 1:
        return found.dtype if isinstance(found, torch.Tensor) else torch.get_default_dtype()
    dtype = torch.result_type(values[0], values[1])
    for each in values[2:]:
        dtype = torch.result_type(torch.empty((1,) if len(values) else (), dtype=dtype, device="meta"), each)
    return dtype


def _scalar(array: Array) -> bool:
    return not array.sizes


def _inner(dtype: torch.dtype) -> torch.dtype:
    """In which torch computes what is of a dtype."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _reshaped(old: Indices, new: Indices, index: Indices) -> Indices:
    """The index of an element in its old shape: in runs of dimensions with as many elements."""
    found: list[Index] = []
    i = j = 0
    while i < len(old):
        first, start = i, j
        have, want = old[i].value, new[j].value if j < len(new) else 1
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have *= old[i].value
                i += 1
            else:
                want *= new[j].value
                j += 1
        # Sizes of 1 at the end belong to this run, or there is nothing left to hold them.
        while i < len(old) and old[i].value == 1:
            i += 1
        while j < len(new) and new[j].value == 1:
            j += 1
        found += _within(old[first:i], new[start:j], index[start:j])
    return tuple(found)


def _within(old: Indices, new: Indices, index: Indices) -> Iterator[Index]:
    flat = Index()
    for each, size in zip(index, new, strict=True):
        flat = flat * size + each
    if len([size for size in old if size.value > 1]) < 2:
        yield from (flat if size.value > 1 else Index() for size in old)
        return
    for place, _ in enumerate(old):
        yield flat // product_of(old[place + 1 :]) % old[place] if place else flat // product_of(old[1:])


# The operations.


def _of(function: str, *names: str) -> Rule:
    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        args = [arguments[name] for name in names]
        return lowering.pointwise(function, *args)

    return rule


def _float(function: str, *names: str) -> Rule:
    """Of functions whose results are no integers."""

    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        args = [arguments[name] for name in names]
        if not all(each.dtype.is_floating_point for each in args if isinstance(each, Array)):
            return None
        return lowering.pointwise(function, *args)

    return rule


def _added(function: str) -> Rule:
    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        one, other, alpha = arguments["self"], arguments["other"], arguments.values.get("alpha", 1)
        if alpha == 1:
            return lowering.pointwise(function, one, other)
        return lowering.pointwise(f"{function}_scaled", one, other, alpha)

    return rule


def _compared(function: str) -> Rule:
    return lambda lowering, arguments: lowering.compare(function, arguments["self"], arguments["other"])


def _logical(function: str) -> Rule:
    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        args = [arguments["self"], arguments["other"]]
        boolean = all(isinstance(each, Array) and each.dtype == torch.bool for each in args)
        return lowering.pointwise(function, *args) if boolean else None

    return rule


def _divided(lowering: _Lowering, arguments: Arguments) -> Array | None:
    one, other = arguments["self"], arguments["other"]
    if not all(each.dtype.is_floating_point for each in (one, other) if isinstance(each, Array)):
        return None
    return lowering.pointwise("div", one, other)


def _reversed_sub(lowering: _Lowering, arguments: Arguments) -> Array | None:
    if arguments["alpha"] != 1:
        return None
    return lowering.pointwise("sub", arguments["other"], arguments["self"])


def _power(lowering: _Lowering, arguments: Arguments) -> Array | None:
    base, exponent = arguments["self"], arguments["exponent"]
    if not base.dtype.is_floating_point:
        return None
    if exponent in (2, 3):
        wide = lowering.cast(base, _inner(base.dtype))
        square = lowering.pointwise("mul", wide, wide)
        return square if exponent == 2 else lowering.pointwise("mul", square, wide)
    named = {1: "cast", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    return lowering.pointwise(named[exponent], base) if exponent in named else None


def _square(lowering: _Lowering, arguments: Arguments) -> Array | None:
    return lowering.pointwise("mul", arguments["self"], arguments["self"])


def _clamped(lowering: _Lowering, arguments: Arguments) -> Array | None:
    value, low, high = arguments["self"], arguments.values.get("min"), arguments.values.get("max")
    if low is not None:
        value = lowering.pointwise("maximum", value, low)
    return value if high is None else lowering.pointwise("minimum", value, high)


def _gelu(lowering: _Lowering, arguments: Arguments) -> Array | None:
    return lowering.pointwise("gelu" if arguments["approximate"] == "none" else "gelu_tanh", arguments["self"])


def _elu(lowering: _Lowering, arguments: Arguments) -> Array | None:
    if arguments["scale"] != 1 or arguments["input_scale"] != 1:
        return None
    return lowering.pointwise("elu", arguments["self"], arguments["alpha"])


def _filled(lowering: _Lowering, arguments: Arguments) -> Array | None:
    one, mask, value = arguments["self"], arguments["mask"], arguments["value"]
    if isinstance(value, Array) and value.sizes:
        return None
    return lowering.pointwise("where", mask, value, one)


def _where(lowering: _Lowering, arguments: Arguments) -> Array | None:
    condition = arguments["condition"]
    if condition.dtype != torch.bool:
        return None
    return lowering.pointwise("where", condition, arguments["self"], arguments["other"])


def _scaled(function: str) -> Rule:
    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        names = ("self", "tensor1", "tensor2", "value")
        return lowering.pointwise(function, *(arguments[name] for name in names))

    return rule


def _converted(lowering: _Lowering, arguments: Arguments) -> Array | None:
    value, dtype = arguments["self"], arguments.values.get("dtype")
    other = arguments.values.get("other")
    if isinstance(other, Array):
        dtype = other.dtype
    if dtype is not None and dtype.is_complex:
        return None
    if (
        dtype is not None
        and dtype != value.dtype
        and (dtype == torch.bool or (value.dtype.is_floating_point and not dtype.is_floating_point))
    ):
        return None  # what is out of range is rounded in ways of its own
    return lowering.cast(value, dtype) if dtype is not None else _same(lowering, arguments)


def _same(lowering: _Lowering, arguments: Arguments) -> Array | None:
    value = arguments["self"]
    return lowering.view(value, value.sizes, lambda index: index, lambda tensor: tensor)


def _rms(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["x"]
    if x.dtype not in (torch.float32, torch.float64):
        return None
    mean = lowering.mean(lowering.pointwise("mul", x, x), [-1], True)
    return lowering.pointwise("mul", x, lowering.pointwise("rsqrt", lowering.pointwise("add", mean, arguments["eps"])))


def _layer_norm(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    affine = [each for each in (weight, bias) if each is not None]
    if any(each.dtype != x.dtype for each in affine):
        return None
    dims = range(-len(arguments["normalized_shape"]), 0)
    wide = lowering.cast(x, _inner(x.dtype))
    centred = lowering.pointwise("sub", wide, lowering.mean(wide, dims, True))
    variance = lowering.mean(lowering.pointwise("mul", centred, centred), dims, True)
    scale = lowering.pointwise("rsqrt", lowering.pointwise("add", variance, arguments["eps"]))
    found = lowering.pointwise("mul", centred, scale)
    if weight is not None:
        found = lowering.pointwise("mul", found, lowering.cast(weight, wide.dtype))
    if bias is not None:
        found = lowering.pointwise("add", found, lowering.cast(bias, wide.dtype))
    return lowering.cast(found, x.dtype)


def _rms_norm(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, weight, eps = arguments["input"], arguments["weight"], arguments["eps"]
    if weight is not None and weight.dtype != x.dtype:
        return None
    wide = lowering.cast(x, _inner(x.dtype))
    dims = range(-len(arguments["normalized_shape"]), 0)
    mean = lowering.mean(lowering.pointwise("mul", wide, wide), dims, True)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    found = lowering.pointwise("mul", wide, lowering.pointwise("rsqrt", lowering.pointwise("add", mean, eps)))
    if weight is not None:
        found = lowering.pointwise("mul", found, lowering.cast(weight, wide.dtype))
    return lowering.cast(found, x.dtype)


def _softmax(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, dim, dtype = arguments["self"], arguments["dim"], arguments.values.get("dtype")
    if not x.sizes or arguments.values.get("half_to_float"):
        return None
    x = lowering.cast(x, dtype or x.dtype)
    wide = lowering.cast(x, _inner(x.dtype))
    shifted = lowering.pointwise("exp", lowering.pointwise("sub", wide, lowering.reduce("max", wide, [dim], True)))
    found = lowering.pointwise("div", shifted, lowering.reduce("sum", shifted, [dim], True))
    return lowering.cast(found, dtype or x.dtype)


def _dims(arguments: Arguments) -> list[int]:
    dims = arguments.values.get("dim")
    rank = len(arguments["self"].sizes)
    if dims is None or dims == ():
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, (tuple, list)) else [dims])]


def _summed(kind: str) -> Rule:
    def rule(lowering: _Lowering, arguments: Arguments) -> Array | None:
        x, keep = arguments["self"], bool(arguments.values.get("keepdim", False))
        dtype = arguments.values.get("dtype") or x.dtype
        if not x.dtype.is_floating_point or not x.sizes:
            return None
        wide = lowering.cast(x, _inner(dtype))
        dims = _dims(arguments)
        found = lowering.mean(wide, dims, keep) if kind == "mean" else lowering.reduce(kind, wide, dims, keep)
        return lowering.cast(found, dtype)

    return rule


def _rotary(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, cos, sin, half, end = (arguments[name] for name in ("x", "cos", "sin", "half", "end"))
    size = x.shape[-1]
    if end not in (None, size) or 2 * half != size or not x.dtype == cos.dtype == sin.dtype:
        return None
    low = lowering.slice(x, -1, Index.of(0), Index.of(half))
    high = lowering.slice(x, -1, Index.of(half), Index.of(half))
    turned = lowering.add(
        Joined(
            lowering.label,
            x.sizes,
            x.dtype,
            x.grouped,
            lowering._ops,
            (lowering.pointwise("neg", high), low),
            len(x.sizes) - 1,
        )
    )
    return lowering.pointwise("rotated", x, turned, cos, sin)


def _roll_products(lowering: _Lowering, arguments: Arguments) -> Array | None:
    """``x[c % size] * x[(c % size - shift) % size]``: rolled by reading elsewhere."""
    x, shifts = arguments["x"], list(arguments["shifts"])
    size = x.shape[-1]
    first, step = shifts[0], shifts[1] - shifts[0] if len(shifts) > 1 else 0
    even = all(shift == first + n * step for n, shift in enumerate(shifts))
    if not even or step < 0 or max(shifts) > size:
        return None
    sizes = (*x.sizes[:-1], Index.of(size * len(shifts)))

    def rolled(index: Indices) -> Indices:
        which, place = index[-1] // size, index[-1] % size
        return (*index[:-1], (place + size - first - which * step) % size)

    plain = lowering.view(x, sizes, lambda index: (*index[:-1], index[-1] % size))
    return lowering.pointwise("mul", plain, lowering.view(x, sizes, rolled))


def _linear(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, weight, bias = arguments["input"], arguments["weight"], arguments.values.get("bias")
    if len(weight.sizes) != 2 or len(x.sizes) < 2 or x.dtype != weight.dtype:
        return None
    found = lowering.product(x, lowering.swap(weight, 0, 1))
    return found if bias is None else lowering.pointwise("add", found, bias)


def _matmul(lowering: _Lowering, arguments: Arguments) -> Array | None:
    names = [each.name for each in arguments.schema]
    left, right = arguments[names[0]], arguments[names[1]]
    if min(len(left.sizes), len(right.sizes)) < 2 or left.dtype != right.dtype:
        return None
    return lowering.product(left, right)


def _addmm(lowering: _Lowering, arguments: Arguments) -> Array | None:
    names = [each.name for each in arguments.schema]
    added, left, right = (arguments[name] for name in names[:3])
    if arguments["beta"] != 1 or arguments["alpha"] != 1 or left.dtype != right.dtype:
        return None
    return lowering.pointwise("add", added, lowering.product(left, right))


def _add_linear(lowering: _Lowering, arguments: Arguments) -> Array | None:
    residual, x, weight = (arguments[name] for name in ("residual", "x", "weight"))
    if len(weight.sizes) != 2 or len(x.sizes) < 2 or x.dtype != weight.dtype:
        return None
    return lowering.pointwise("add", residual, lowering.product(x, lowering.swap(weight, 0, 1)))


def _add_matmul(lowering: _Lowering, arguments: Arguments) -> Array | None:
    residual, left, right, alpha = (arguments[name] for name in ("residual", "left", "right", "alpha"))
    if min(len(left.sizes), len(right.sizes)) < 2 or left.dtype != right.dtype:
        return None
    found = lowering.product(left, right)
    if alpha == 1:
        return lowering.pointwise("add", residual, found)
    return lowering.pointwise("add_scaled", residual, found, alpha)


def _attention(lowering: _Lowering, arguments: Arguments) -> Array | None:
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if arguments["dropout_p"] != 0 or len({len(each.sizes) for each in (query, key, value)}) > 1:
        return None
    if len(query.sizes) == 3 and (mask is None or len(mask.sizes) < 4):
        arguments.values |= {name: lowering.unsqueeze(arguments[name], 1) for name in ("query", "key", "value")}
        if mask is not None and len(mask.sizes) == 3:
            arguments.values["attn_mask"] = lowering.unsqueeze(mask, 1)
        found = _attention(lowering, arguments)
        return found if found is None else lowering.select(found, 1, Index())
    if len(query.sizes) != 4:
        return None
    if len({each.dtype for each in (query, key, value)}) > 1 or key.shape[1] != value.shape[1]:
        return None
    if query.shape[0] != key.shape[0] or key.shape[0] != value.shape[0] or query.shape[1] % key.shape[1]:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None
    scale = arguments["scale"]
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    operands = (query, key, value)
    sizes = (*query.sizes[:-1], value.sizes[-1])
    grouped = any(each.grouped for each in (*operands, *(() if mask is None else (mask,))))
    causal = bool(arguments["is_causal"])
    of = (lowering.label, sizes, query.dtype, grouped, lowering._ops)
    return lowering.add(Attention(*of, query, key, value, mask, causal, scale))


def _sliced(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, dim, step = arguments["self"], arguments["dim"], arguments["step"]
    start, end = arguments["start"], arguments["end"]
    if any(isinstance(each, Array) for each in (start, end, step)):
        return None
    size = x.sizes[dim]
    first = _clipped(0 if start is None else start, size)
    last = _clipped(size.value if end is None else end, size) if end is not None else size
    length = last - first
    if length.value <= 0:
        return None
    if step != 1:
        length = Index.of(-(-length.value // step))
    return lowering.slice(x, dim, first, length, step)


def _clipped(place: int, size: Index) -> Index:
    """Where a slice starts or ends."""
    if place < 0:
        return size - -place if -place < size.value else Index()
    if place >= size.value:
        return size
    return Index.of(Symbol(int(place))) if isinstance(place, _Size) and place > 0 else Index.of(int(place))


def _selected(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, dim, index = arguments["self"], arguments["dim"], arguments["index"]
    if isinstance(index, Array):
        return None
    return lowering.select(x, dim, _clipped(index, x.sizes[dim]))


def _viewed(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["self"]
    shape = arguments.values.get("size") or arguments.values.get("shape") or ()
    return None if 0 in x.shape else lowering.reshape(x, shape)


def _flattened(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["self"]
    rank = max(1, len(x.sizes))
    start, end = arguments["start_dim"] % rank, arguments["end_dim"] % rank
    return None if 0 in x.shape else lowering.reshape(x, [*x.shape[:start], -1, *x.shape[end + 1 :]])


def _unflattened(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["self"]
    dim = arguments["dim"] % len(x.sizes)
    if 0 in x.shape:
        return None
    sizes, rest = list(arguments["sizes"]), x.shape[dim]
    for size in sizes:
        rest //= size if size != -1 else 1
    return lowering.reshape(x, [*x.shape[:dim], *(rest if s == -1 else s for s in sizes), *x.shape[dim + 1 :]])


def _squeezed(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, dim = arguments["self"], arguments["dim"]
    return lowering.select(x, dim, Index()) if x.shape[dim] == 1 else _same(lowering, arguments)


def _permuted(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["self"]
    return lowering.transpose(x, *(dim % len(x.sizes) for dim in arguments["dims"]))


def _transposed(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x = arguments["self"]
    if "dim0" in arguments.values:
        return lowering.swap(x, arguments["dim0"] % len(x.sizes), arguments["dim1"] % len(x.sizes))
    return lowering.swap(x, 0, 1) if len(x.sizes) == 2 else None


def _cat(lowering: _Lowering, arguments: Arguments) -> Array | None:
    parts = [each for each in arguments["tensors"] if each.shape != (0,)]
    return _joined(lowering, parts, arguments["dim"])


def _stack(lowering: _Lowering, arguments: Arguments) -> Array | None:
    parts = [lowering.unsqueeze(each, arguments["dim"]) for each in arguments["tensors"]]
    return _joined(lowering, parts, arguments["dim"])


def _joined(lowering: _Lowering, parts: list[Array], dim: int) -> Array | None:
    dtype = parts[0].dtype
    for each in parts[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    parts = [lowering.cast(each, dtype) for each in parts if each.shape[dim]]
    if not parts:
        return None
    place = dim % len(parts[0].sizes)
    total = Index()
    for each in parts:
        total = total + each.sizes[place]
    sizes = (*parts[0].sizes[:place], total, *parts[0].sizes[place + 1 :])
    grouped = any(each.grouped for each in parts)
    return lowering.add(Joined(lowering.label, sizes, dtype, grouped, lowering._ops, tuple(parts), place))


def _repeated(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, repeats = arguments["self"], [int(each) for each in arguments["repeats"]]
    new = len(repeats) - len(x.sizes)
    sizes = tuple(Index.of(n) * (x.sizes[dim - new] if dim >= new else 1) for dim, n in enumerate(repeats))
    own = x.sizes

    def at(index: Indices) -> Indices:
        return tuple(each % size for each, size in zip(index[new:], own, strict=True))

    return None if 0 in x.shape or 0 in repeats else lowering.view(x, sizes, at)


def _rolled(lowering: _Lowering, arguments: Arguments) -> Array | None:
    x, shifts, dims = arguments["self"], arguments["shifts"], arguments["dims"]
    if len(shifts) != 1 or len(dims) != 1 or not x.shape[dims[0]]:
        return None
    dim = dims[0] % len(x.sizes)
    size = x.sizes[dim]
    shift = shifts[0] % size.value

    def at(index: Indices) -> Indices:
        return (*index[:dim], (index[dim] + size - shift) % size, *index[dim + 1 :])

    return lowering.view(x, x.sizes, at)


def _einsum(lowering: _Lowering, arguments: Arguments) -> Array | None:
    """Of two operands without repeated letters: a batched product."""
    equation, tensors = arguments["equation"].replace(" ", ""), arguments["tensors"]
    if "->" not in equation or "." in equation or len(tensors) != 2 or tensors[0].dtype != tensors[1].dtype:
        return None
    given, wanted = equation.split("->")
    one, other = given.split(",")
    if any(len(set(each)) < len(each) for each in (one, other, wanted)):
        return None
    batch = [c for c in wanted if c in one and c in other]
    rows, columns = ([c for c in wanted if c in each and c not in batch] for each in (one, other))
    inner = [c for c in one if c in other and c not in wanted]
    if len(batch) + len(rows) + len(inner) < len(one) or len(batch) + len(columns) + len(inner) < len(other):
        return None
    sizes = [dict(zip(one, tensors[0].shape, strict=True)), dict(zip(other, tensors[1].shape, strict=True))]
    size = sizes[0] | sizes[1]
    if not inner or 0 in size.values() or any(sizes[0].get(c, n) != n for c, n in sizes[1].items()):
        return None

    def matrix(array: Array, letters: str, *groups: list[str]) -> Array:
        ordered = lowering.transpose(array, *(letters.index(c) for group in (batch, *groups) for c in group))
        shape = [size[c] for c in batch]
        for group in groups:
            total = 1
            for c in group:
                total *= size[c]
            shape.append(total)
        return lowering.reshape(ordered, shape)

    found = lowering.product(matrix(tensors[0], one, rows, inner), matrix(tensors[1], other, inner, columns))
    found = lowering.reshape(found, [size[c] for c in (*batch, *rows, *columns)])
    order = [*batch, *rows, *columns]
    return lowering.transpose(found, *(order.index(c) for c in wanted))


_SIMPLE = {
    "abs": "abs", "neg": "neg", "relu": "relu",
}  # fmt: skip
_FLOAT = {
    "ceil": "ceil", "cos": "cos", "erf": "erf", "exp": "exp", "floor": "floor", "log": "log",
    "reciprocal": "reciprocal", "rsqrt": "rsqrt", "sigmoid": "sigmoid", "silu": "silu", "sin": "sin", "sqrt": "sqrt",
    "tanh": "tanh",
}  # fmt: skip


def _targets(*names: str) -> Iterator[torch._ops.OpOverload]:
    for name in names:
        packet, _, overload = name.partition(".")
        target = getattr(getattr(aten, packet, None), overload or "default", None)
        if target is not None:
            yield target


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}

    def put(rule: Rule, *names: str) -> None:
        table.update((target, rule) for target in _targets(*names))

    for name, function in _SIMPLE.items():
        put(_of(function, "self"), name)
    for name, function in _FLOAT.items():
        put(_float(function, "self"), name)
    for function in ("add", "sub"):
        put(_added(function), f"{function}.Tensor", f"{function}.Scalar")
    put(_of("mul", "self", "other"), "mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")
    put(_of("maximum", "self", "other"), "maximum")
    put(_of("minimum", "self", "other"), "minimum")
    for function in ("eq", "ne", "lt", "le", "gt", "ge"):
        put(_compared(function), f"{function}.Tensor", f"{function}.Scalar")
    for function in ("and", "or", "xor"):
        put(_logical(function), f"logical_{function}", f"__{function}__.Tensor", f"bitwise_{function}.Tensor")
    put(_divided, "div.Tensor", "div.Scalar", "divide.Tensor", "true_divide.Tensor")
    put(_reversed_sub, "rsub.Scalar", "rsub.Tensor")
    put(_power, "pow.Tensor_Scalar")
    put(_square, "square")
    put(_clamped, "clamp", "clamp_min", "clamp_max")
    put(_gelu, "gelu")
    put(_elu, "elu")
    put(_float("leaky_relu", "self", "negative_slope"), "leaky_relu")
    put(_float("softplus", "self", "beta", "threshold"), "softplus")
    put(_filled, "masked_fill.Scalar", "masked_fill.Tensor")
    put(_where, "where.self", "where.Scalar", "where.ScalarOther", "where.ScalarSelf")
    put(_scaled("addcdiv"), "addcdiv")
    put(_scaled("addcmul"), "addcmul")
    put(_converted, "to.dtype", "_to_copy", "to.other", "type_as", "to.dtype_layout")
    put(_same, "alias", "detach", "contiguous", "clone", "lift_fresh_copy", "lift_fresh")
    put(_layer_norm, "layer_norm")
    put(_rms_norm, "rms_norm")
    put(_softmax, "softmax.int", "_softmax")
    put(_summed("sum"), "sum.dim_IntList", "sum.default")
    put(_summed("mean"), "mean.dim", "mean.default")
    put(_linear, "linear")
    put(_matmul, "matmul", "mm", "bmm")
    put(_addmm, "addmm", "baddbmm")
    put(_einsum, "einsum")
    put(_attention, "scaled_dot_product_attention")
    put(_sliced, "slice.Tensor")
    put(_selected, "select.int")
    put(_viewed, "view", "reshape", "_unsafe_view")
    put(_flattened, "flatten.using_ints")
    put(_unflattened, "unflatten.int")
    put(lambda lowering, arguments: lowering.unsqueeze(arguments["self"], arguments["dim"]), "unsqueeze")
    put(lambda lowering, arguments: lowering.expand(arguments["self"], arguments["size"]), "expand")
    put(_squeezed, "squeeze.dim")
    put(_permuted, "permute")
    put(_transposed, "transpose.int", "t")
    put(_cat, "cat")
    put(_stack, "stack")
    put(_repeated, "repeat")
    put(_rolled, "roll")
    table.update({rms_normalize: _rms, rotary: _rotary, roll_products: _roll_products})
    table.update({add_linear: _add_linear, add_matmul: _add_matmul})
    return table


_RULES = _table()
