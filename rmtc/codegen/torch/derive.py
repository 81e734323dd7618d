"""A kernel and its derivative as straight-line source: what autograd runs for it, written down.

Autograd takes as long to record an operation as a small operation takes to run, and records the same in each step. So
it is watched twice (:mod:`rmtc.codegen.torch.recording`), for groups of two sizes, and both halves are printed as
functions for groups of any size. Above what is watched, torch chooses by strides. So the source is right only for
operands and gradients that lie in memory as those did for which it was watched. What it makes itself is looked at in
the first run for each size.
"""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch

from rmtc.codegen.torch.emit import BUILTINS
from rmtc.codegen.torch.recording import Noted, Recorded, TensorNumber, UnlikeError
from rmtc.codegen.torch.trees import Apply, Raw, TensorName, call, literal
from rmtc.codegen.torch.values import fast, function_name

aten = torch.ops.aten

_NUMBERS = itertools.count()


class Half:
    """One half of a kernel, as a function ``(G, ...) -> ...``.

    Views are read at the strides that the kernel had when it was watched, and torch does not promise that they are the
    same for groups of all sizes. So the first run for a size looks at them.

    Args:
        quick: the half.
        careful: the same, which looks at the strides of all that has views, before it adds to any given gradient.

    Attributes:
        sizes: numbers of cells for which it has run.
    """

    def __init__(self, quick: Callable[..., Any], careful: Callable[..., Any]) -> None:
        self.quick, self.careful = quick, careful
        self.sizes: set[int] = set()

    def __call__(self, size: int, *parts: Sequence[torch.Tensor | None]) -> Any:
        """Run the half.

        Raises:
            UnlikeError: if something lies in memory otherwise than when it was watched.
        """
        if size in self.sizes:
            return self.quick(size, *parts)
        found = self.careful(size, *parts)
        self.sizes.add(size)
        return found


@dataclass
class Derived:
    """A kernel as source of two halves.

    Attributes:
        recorded: what the source is of.
        forward: ``(G, operands) -> (results, kept)``.
        kept: the numbers of what the forward half keeps.
        reads: the numbers of the operands that the backward half reads.
        again: the numbers of what it computes again.
        source: the text of both.
    """

    recorded: Recorded
    forward: Half
    kept: Sequence[int]
    reads: Sequence[int]
    again: Set[int] = frozenset()
    source: list[str] = field(default_factory=list)

    def backward(self, recorded: Recorded) -> tuple[Half, Sequence[int]]:
        """Return the derivative, and the numbers of the gradients that it adds to.

        Args:
            recorded: what is recorded where some results have no gradient. The first half has to be the same.

        Returns:
            ``(G, operands that it reads, what is kept, gradients to be added to, gradients of results) -> gradients``.

        Raises:
            UnlikeError: if it reads what is not kept.
        """
        one, other = ([step for step in each.steps if not step.backward] for each in (recorded, self.recorded))
        if one != other:
            raise UnlikeError("the first half runs other operations than before")
        steps, needed = _live(_with(recorded.steps, self.again), recorded.wanted)
        first, last = recorded.operands, recorded.operands + recorded.into
        if not needed <= {*self.reads, *self.kept, *range(first, last + recorded.tangents)}:
            raise UnlikeError("it reads what is not kept")
        into = sorted(number - first for number in needed if first <= number < last)
        parts = {
            "operands": self.reads,
            "kept": self.kept,
            "into": [first + number for number in into],
            "gradients": range(last, last + recorded.tangents),
        }
        found = [None if each is None else each.number for each in recorded.gradients]
        stays = [*self.kept, *self.reads, *found]
        half, source = _half("backward", parts, steps, f"({_joined(found)})", stays, recorded)
        self.source.append(source)
        return half, into


def derived(recorded: Recorded, lean: bool = False) -> Derived:
    """Print a kernel whose results all have gradients.

    Args:
        recorded: the kernel.
        lean: whether the backward half computes again what takes memory to keep and little time to compute.

    Raises:
        UnlikeError: if a result is an operand, or the same as another one.
    """
    results = [each.number for each in recorded.results]
    if len(set(results)) < len(results) or min(results) < recorded.operands:
        raise UnlikeError("a result is an operand or another result")
    made = {step.made for step in recorded.steps if not step.backward}
    again = _cheap(recorded, _live(recorded.steps, recorded.wanted)[1] & made) if lean else set()
    # A view of a result that is kept would keep the result, whose graph keeps the view: none of them would be let go.
    again |= {step.made for step in recorded.steps if step.target == "as_strided" and step.args[0].number in results}
    _, needed = _live(_with(recorded.steps, again), recorded.wanted)
    kept, reads = sorted(needed & made), sorted(number for number in needed if number < recorded.operands)
    steps, _ = _live(recorded.steps, [TensorNumber(number) for number in (*results, *kept)], False)
    parts = {"operands": range(recorded.operands)}
    returned = f"({_joined(results)}), ({_joined(kept)})"
    half, source = _half("forward", parts, steps, returned, [*results, *kept], recorded)
    return Derived(recorded, half, kept, reads, again, [source])


def _cheap(recorded: Recorded, needed: Set[int]) -> Set[int]:
    """Return what the backward half computes again so that fewest bytes are kept, and least is computed again.

    A minimal cut is between what the derivative reads and what only products, attention and reductions give. Operands
    are there in any case. Results are not: the next cells read copies of them, put together with others.
    """
    places = {step.made: place for place, step in enumerate(recorded.steps) if not step.backward and not step.writes}
    graph = nx.DiGraph()
    graph.add_nodes_from(("read", "given"))
    graph.add_edges_from(("read", (number, "kept")) for number in needed)
    for number, place in places.items():
        step = recorded.steps[place]
        graph.add_edge((number, "kept"), (number, "again"), capacity=recorded.memories.get(number, (0, 0))[1])
        touched = recorded.memories_of((number, *step.reads))
        # What is written to later is another thing in the backward half.
        if _is_cheap(step) and all(recorded.written.get(memory, -1) < place for memory in touched):
            graph.add_edges_from(((number, "again"), (each, "kept")) for each in step.reads if each in places)
        else:
            graph.add_edge((number, "again"), "given")
    _, (reached, _) = nx.minimum_cut(graph, "read", "given")
    return {number for number in places if (number, "again") in reached}


def _is_cheap(step: Noted) -> bool:
    if isinstance(step.target, str):
        return step.target == "as_strided"
    pointwise = torch.Tag.pointwise in step.target.tags
    return not step.draws and (pointwise or step.target in (aten.cat.default, aten.stack.default))


def _with(steps: Sequence[Noted], again: Set[int]) -> list[Noted]:
    """Return operations with those of the forward half that the backward half runs again at its begin."""
    front = [replace(step, backward=True) for step in steps if step.made in again and not step.backward]
    return [*front, *steps]


def _live(
    noted: Sequence[Noted], wanted: Sequence[TensorNumber], backward: bool = True
) -> tuple[list[Noted], set[int]]:
    """Return the operations of one half that matter for what is wanted, and what they read of elsewhere."""
    needed, found = {each.number for each in wanted}, list[Noted]()
    for step in reversed(noted):
        if step.backward is backward and (step.made in needed or step.writes):
            needed |= step.reads
            found.append(step)
    found.reverse()
    return found, needed - {step.made for step in found if not step.writes}


def _joined(numbers: Sequence[int | None]) -> str:
    return "".join(f"{None if number is None else f'v{number}'}, " for number in numbers)


def _half(
    name: str,
    parts: Mapping[str, Sequence[int]],
    steps: Sequence[Noted],
    returned: str,
    stays: Sequence[int | None],
    recorded: Recorded,
) -> tuple[Half, str]:
    """Print a half, and return it with its text.

    Args:
        name: its name.
        parts: its parameters, and the numbers of the tensors in each.
        steps: its operations.
        returned: what it returns.
        stays: numbers of tensors that are not deleted after their last use.
        recorded: what it is of.
    """
    space: dict[str, Any] = {"torch": torch, "lies": _lies, "__builtins__": BUILTINS}
    head = [f"def {name}(G, {', '.join(parts)}):"]
    head += [f"    {_joined(numbers)} = {part}" for part, numbers in parts.items() if numbers]
    wholes = {step.args[0].number for step in steps if step.target == "as_strided"}
    looks = {number: f"    {call('lies', TensorName(f'v{number}'), *recorded.layouts[number])}" for number in wholes}
    given = wholes & {number for numbers in parts.values() for number in numbers}
    quick = [*head, *_lines(steps, space, stays, {})]
    seen = [looks[number] for number in sorted(given)]
    careful = [*head, *seen, *_lines(_adding_last(steps, parts.get("into", ()), recorded), space, stays, looks)]
    (one, source), (other, _) = (
        _function(name, [*lines, f"    return {returned}", ""], space) for lines in (quick, careful)
    )
    return Half(one, other), source


def _adding_last(steps: Sequence[Noted], into: Sequence[int], recorded: Recorded) -> list[Noted]:
    """Return operations with those that add to given gradients at the end: whatever fails before has added nothing.

    Raises:
        UnlikeError: if what one of them reads is written to later, or what it adds to is read.
    """
    own, read, adding, rest = {*recorded.memories_of(into)}, set[int](), list[Noted](), list[Noted]()
    for step in steps:
        written = recorded.memories[step.made][0] if step.writes else None
        memories = recorded.memories_of(step.reads)
        if written in own:
            adding.append(step)
            read.update(memories)
            continue
        rest.append(step)
        if written in read or (adding and step.target != "as_strided" and not own.isdisjoint(memories)):
            raise UnlikeError("what is added to a gradient is written to afterwards, or the gradient is read")
    return [*rest, *adding]


def _lines(
    steps: Sequence[Noted], space: dict[str, Any], stays: Sequence[int | None], looks: Mapping[int, str]
) -> list[str]:
    """Print operations, with a look at the layout behind each that makes what there is a look for."""
    last = {number: place for place, step in enumerate(steps) for number in (*step.reads, step.made)}
    dying: dict[int, list[int]] = {}
    for number, place in last.items():
        if number not in stays:
            dying.setdefault(place, []).append(number)
    lines = []
    for place, step in enumerate(steps):
        lines.append(_line(step, space))
        if step.made in looks and not step.writes:
            lines.append(looks[step.made])
        if place in dying:
            lines.append(f"    del {', '.join(f'v{number}' for number in sorted(dying[place]))}")
    return lines


def _lies(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> None:
    """Raise an error if a tensor does not lie in memory so."""
    steps = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    if list(tensor.shape) != size or steps != [(n, step) for n, step in zip(size, stride, strict=True) if n != 1]:
        raise UnlikeError(f"{size} with strides {tensor.stride()} in place of {stride}")


def _line(step: Noted, space: dict[str, Any]) -> str:
    """Print an operation."""
    args = [_named(each) for each in step.args]
    kwargs = {key: _named(each) for key, each in step.kwargs.items()}
    if step.target == "__getitem__":
        tree: Any = Raw(args[0], f"[{args[1]}]")
    elif step.target == "as_strided":
        whole, *sizes, start = args
        later = [Raw(whole, f".storage_offset() + {literal(start)}")] if start != 0 else []
        tree = call(".as_strided", whole, *sizes, *later)
    elif isinstance(step.target, str):
        tree = call(f".{step.target}", *args)
    else:
        function = function_name(step.target)
        space[function] = fast(step.target)
        tree = Apply(function, tuple(args), tuple(kwargs.items()))
    return f"    {tree}" if step.writes else f"    v{step.made} = {tree}"


def _function(name: str, lines: Sequence[str], space: Mapping[str, Any]) -> tuple[Callable[..., Any], str]:
    source, space = "\n".join(lines), dict(space)
    file = f"<rmtc {name} {next(_NUMBERS)}>"
    exec(compile(source, file, "exec"), space)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    weakref.finalize(space[name], linecache.cache.pop, file, None).atexit = False
    return space[name], source


def _named(value: Any) -> Any:
    if isinstance(value, TensorNumber):
        return TensorName(f"v{value.number}")
    return [_named(each) for each in value] if isinstance(value, list) else value
