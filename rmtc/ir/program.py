"""A flat functional program: one run of the user's code, as a list of operations over values."""

from __future__ import annotations

import ast
import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from rmtc.errors import Location, VerifyError
from rmtc.grouping import by_key

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Operations that compute nothing: their result is their operand, seen in another way."""

SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.chunk.default,
        aten.unbind.int,
    }
)
"""Operations whose results are parts of their operand."""

CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout})
"""Operations whose result is their operand, if it has the dtype and the device that they name, or a copy that has."""

COPIES = CASTS | {
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
}
"""Operations whose result is their operand position by position, elsewhere or in another dtype."""


def piece_bounds(size: int, points: Sequence[int]) -> list[tuple[int, int]]:
    """Return where the pieces of `tensor_split` begin and end, in a dimension of a size that is divided at points.

    Points that do not rise give empty pieces, and others that overlap, as slices from one point to the next do.
    """
    ends = [slice(None, point).indices(size)[1] for point in points]
    return [(start, max(start, end)) for start, end in itertools.pairwise((0, *ends, size))]


class Val(NamedTuple):
    """The result of an operation, by its index in the program."""

    number: int

    def __str__(self) -> str:
        return f"%{self.number}"


class Src(NamedTuple):
    """A tensor that exists before the program runs, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Source:
    """A parameter, buffer, state tensor, input or constant tensor.

    Attributes:
        kind: ``parameter``, ``buffer``, ``state``, ``input`` or ``constant``.
        names: all names of the tensor.
        shape, dtype: of the tensor.
        value: value of a constant.
    """

    kind: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None = field(default=None, compare=False)


Form: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


class Origin(NamedTuple):
    """The place in the user's code that an operation comes from.

    Attributes:
        location: the file, line and function.
        module: path of the submodule that ran it.
        name: attribute or result that the value ends up in, such as ``layers.3.A``; empty if none.
        variable: variable that holds the value in the user's code; empty if none.
    """

    location: Location | None = None
    module: str = ""
    name: str = ""
    variable: str = ""


_UNKNOWN = Origin()


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a flat program, of a loop or of a body, which differ in their operands.

    Attributes:
        target: the ATen overload or `operator.getitem`.
        args: positional arguments and then ``(name, value)`` pairs of keyword arguments, nested tuples. Tensors are
            :class:`Val` and :class:`Src` in a program, the operands of :mod:`rmtc.ir.segment_loop` in a loop, those of
            :mod:`rmtc.ir.wavefront` in a body.
        origin: the place it comes from.
        form: shape and dtype of the result; None if it is no tensor, or they are not known. In a loop they are those of
            the shorter of the two runs, which ends with a full segment.
        covers: numbers of the other operations of the same cell whose work it does, besides its own.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    origin: Origin = _UNKNOWN
    form: Form | None = field(default=None, compare=False)
    covers: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def location(self) -> Location | None:
        """The place in the user's code."""
        return self.origin.location

    @property
    def name(self) -> str:
        """The attribute or result that the value ends up in."""
        return self.origin.name

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the result, or None if it is no tensor or not known."""
        return None if self.form is None else self.form[0]

    @property
    def label(self) -> str:
        """The name of the target, such as ``mul.Tensor`` or ``getitem``."""
        return target_name(self.target)

    @property
    def random(self) -> bool:
        """True if the operation may draw random numbers: two of them with equal operands differ."""
        return _may_draw(self.target)

    @property
    def draws(self) -> bool:
        """True if the operation draws random numbers."""
        return _may_draw(self.target) and draws(self.target, *call_arguments(self.args))

    def with_args(self, args: tuple[Any, ...]) -> Op:
        """Return the operation with other arguments."""
        return Op(self.target, args, self.origin, self.form, self.covers)

    def __str__(self) -> str:
        name = f"  # {self.name}" if self.name else ""
        return f"{self.label}({', '.join(show(arg) for arg in self.args)}){name}"


@dataclass
class Program:
    """Operations in the order they were run, with the sources they read and the values they give back."""

    ops: list[Op]
    sources: dict[str, Source]
    outputs: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read a program that :meth:`__str__` wrote.

        The text has neither the values of constants nor the modules that ran operations.

            parameter w: float32[8, 8]
            input x: float32[2, 4, 8]
            %0: float32[2, 4, 8] = linear(x, w)  # model.py:12 in forward
            return output = %0

        Raises:
            ValueError: with the line that is none of a program.
        """
        program = cls([], {}, {})
        for line in filter(None, map(str.strip, text.splitlines())):
            if (source := _SOURCE.fullmatch(line)) is not None:
                shape, dtype = _read_form(source["form"])
                program.sources[source["name"]] = Source(source["kind"], (source["name"],), shape, dtype)
            elif (result := _RESULT.fullmatch(line)) is not None:
                (program.outputs[result["name"]],) = _ArgumentReader(result["value"], program.sources).items("")
            elif (op := _OPERATION.fullmatch(line)) is not None and int(op["number"]) == len(program.ops):
                args = _ArgumentReader(op["args"], program.sources).items("")
                form = _read_form(op["form"]) if op["form"] else None
                where = op["file"] and Location(op["file"], int(op["line"]), op["function"])
                program.ops.append(Op(_read_target(op["target"]), args, Origin(where or None), form))
            else:
                raise ValueError(f"{line!r} is no line of a program")
        return program

    def needed(self) -> set[int]:
        """Return the numbers of the operations that a result needs."""
        found: set[int] = set()
        work = [leaf.number for leaf in leaves(tuple(self.outputs.values())) if isinstance(leaf, Val)]
        while work:
            number = work.pop()
            if number not in found:
                found.add(number)
                work += [leaf.number for leaf in leaves(self.ops[number].args) if isinstance(leaf, Val)]
        return found

    def verify(self) -> None:
        """Check that each operand is a source, or the result of an earlier operation.

        Raises:
            VerifyError: if one is not, which is an error of the pass that made the program.
        """
        for index, op in enumerate(self.ops):
            self._verify_operands(f"%{index}", op.args, index)
        for name, value in self.outputs.items():
            self._verify_operands(name, (value,), len(self.ops))

    def _verify_operands(self, reader: str, args: tuple[Any, ...], made: int) -> None:
        for leaf in leaves(args):
            if (isinstance(leaf, Val) and not 0 <= leaf.number < made) or (
                isinstance(leaf, Src) and leaf.name not in self.sources
            ):
                raise VerifyError(f"{reader} reads {leaf}, which is not there yet")

    def __str__(self) -> str:
        sources = self.sources.items()
        lines = [f"{source.kind} {name}: {form_text((source.shape, source.dtype))}" for name, source in sources]
        for index, op in enumerate(self.ops):
            shape = f": {form_text(op.form)}" if op.form is not None else ""
            lines.append(f"%{index}{shape} = {op.label}({', '.join(show(arg) for arg in op.args)})  # {op.location}")
        lines += [f"return {name} = {show(value)}" for name, value in self.outputs.items()]
        return "\n".join(lines)


@functools.cache
def _may_draw(target: Callable[..., Any]) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def given(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by the names in its schema, defaults included."""
    found = dict[str, Any](kwargs)
    for number, each in enumerate(target._schema.arguments):
        found.setdefault(each.name, args[number] if number < len(args) else each.default_value)
    return found


def draws(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation draws random numbers.

    Of those that may, some do not if they drop nothing, nor out of training.
    """
    if not _may_draw(target) or not isinstance(target, torch._ops.OpOverload):
        return False
    known = given(target, args, kwargs)
    training = known.get("train", known.get("training"))
    chances = [known.get(name) for name in ("dropout", "dropout_p", *(("p",) if "train" in known else ()))]
    return training is not False and 0 not in chances


@functools.cache
def target_name(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        overload = target._overloadname
        name = target._schema.name.removeprefix("aten::")
        return name if overload == "default" else f"{name}.{overload}"
    return getattr(target, "__name__", str(target))


def form_text(form: Form) -> str:
    """Print shape and dtype, as in ``float32[2, 4, 8]``."""
    shape, dtype = form
    return f"{show(dtype)}{list(shape)}"


def show(value: Any) -> str:
    """Print an argument."""
    if isinstance(value, tuple) and type(value) is not tuple:  # an operand: each prints itself
        return str(value)
    if isinstance(value, tuple):
        if len(value) == 2 and isinstance(value[0], str):
            return f"{value[0]}={show(value[1])}"
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return repr(value)


def leaves(args: tuple[Any, ...]) -> Sequence[Any]:
    """Return the leaves of nested arguments, in order."""
    if tuple not in map(type, args):
        return args
    found: list[Any] = []
    for arg in args:
        if type(arg) is tuple:
            found += leaves(arg)
        else:
            found.append(arg)
    return found


def parts(ops: Sequence[Op]) -> dict[int, list[int]]:
    """Return, by the number of each operation with several results, the operations that take one of them each."""
    return by_key((op.args[0].number, i) for i, op in enumerate(ops) if op.target is operator.getitem)


def map_leaves(args: tuple[Any, ...], function: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Replace each leaf of nested arguments."""
    return tuple([map_leaves(arg, function) if type(arg) is tuple else function(arg) for arg in args])


def zip_leaves(function: Callable[..., Any], *args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace the leaves in one place of several nested arguments, which are nested alike, by one."""
    return tuple(
        [zip_leaves(function, *each) if type(each[0]) is tuple else function(*each) for each in zip(*args, strict=True)]
    )


def call_arguments(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of an :class:`Op` into positional and keyword arguments.

    The keyword arguments are the pairs at the end.
    """
    pairs = [type(arg) is tuple and len(arg) == 2 and type(arg[0]) is str for arg in args]
    count = pairs.index(True) if True in pairs else len(args)
    return args[:count], dict(args[count:])


class NegativeZero(float):
    """The number -0.0, which compares unequal to 0.0.

    Python takes the two for equal, and 1 / -0.0 is another number than 1 / 0.0.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is NegativeZero

    def __ne__(self, other: object) -> bool:  # that of float would call them equal
        return not self == other

    __hash__ = float.__hash__


_FORM = r"[a-z0-9_]+\[[0-9, ]*\]"
_SOURCE = re.compile(rf"(?P<kind>parameter|buffer|state|input|constant) (?P<name>.+): (?P<form>{_FORM})")
_RESULT = re.compile(r"return (?P<name>.+?) = (?P<value>.+)")
_OPERATION = re.compile(
    rf"%(?P<number>[0-9]+)(?:: (?P<form>{_FORM}))? = (?P<target>[\w.:]+)\((?P<args>.*)\)"
    r"(?:  # (?:None|(?P<file>.+):(?P<line>[0-9]+) in (?P<function>.+)))?"
)
_ATOM = re.compile(r"%(?P<value>[0-9]+)|(?P<keyword>[a-z_]\w*)=|(?P<word>(?:torch\.)?[a-z_]\w*(?::[0-9]+)?)")
_LITERAL = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|True|False|\([^()]+\)"""
    r"|-?(?:[0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|inf|nan)j?"
)


class _ArgumentReader:
    """A reader of printed arguments, from left to right."""

    def __init__(self, text: str, sources: Mapping[str, Source]) -> None:
        self.text, self.at = text, 0
        self.names = sorted(sources, key=len, reverse=True)

    def items(self, end: str) -> tuple[Any, ...]:
        """Read the arguments up to the end of the text, or of a list."""
        found: list[Any] = []
        while self.at < len(self.text) and not (end and self.text.startswith(end, self.at)):
            found.append(self.item())
            if self.text.startswith(", ", self.at):
                self.at += 2
        self.at += len(end)
        return tuple(found)

    def item(self) -> Any:
        for name in self.names:
            end = self.at + len(name)
            if self.text.startswith(name, self.at) and self.text[end : end + 1] in ("", ",", "]"):
                self.at = end
                return Src(name)
        if self.text.startswith("[", self.at):
            self.at += 1
            return self.items("]")
        literal = _LITERAL.match(self.text, self.at)
        if literal is not None:
            self.at = literal.end()
            return _read_literal(literal[0])
        atom = _ATOM.match(self.text, self.at)
        if atom is None:
            raise ValueError(f"{self.text[self.at :]!r} is no argument")
        self.at = atom.end()
        if atom["value"]:
            return Val(int(atom["value"]))
        if atom["keyword"]:
            return atom["keyword"], self.item()
        found = getattr(torch, atom["word"].removeprefix("torch."), None)
        if isinstance(found, _NAMED):
            return found
        try:
            return torch.device(atom["word"])
        except RuntimeError as error:
            raise ValueError(f"{atom['word']!r} is no argument") from error


_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def _read_literal(text: str) -> Any:
    if text.strip("-") in ("inf", "nan"):
        return float(text)
    value = ast.literal_eval(text)
    return NegativeZero(value) if type(value) is float and text.startswith("-") and not value else value


def _read_form(text: str) -> Form:
    dtype, _, sizes = text.partition("[")
    return tuple(map(int, filter(None, sizes.removesuffix("]").split(", ")))), getattr(torch, dtype)


def _read_target(text: str) -> Callable[..., Any]:
    """Return the operator that :func:`target_name` printed as ``text``."""
    if text == "getitem":
        return operator.getitem
    space, _, name = text.rpartition("::")
    name, _, overload = name.partition(".")
    found = getattr(getattr(getattr(torch.ops, space or "aten"), name), overload or "default")
    return cast("Callable[..., Any]", found)
