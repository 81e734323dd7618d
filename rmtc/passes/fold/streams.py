"""Find the parameters that operations use, and the layer that each parameter belongs to."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from rmtc.ir.program import Op, Program, Source, Src, Val, leaves

__all__ = ["Family", "Uses", "Names", "find_family", "names_of", "template", "used_names", "uses"]

_INTEGER = re.compile(r"(?:(?<=^)|(?<=[.\[]))\d+(?=[.\]]|$)")
_ENDING = re.compile(r"(?<=[A-Za-z_])\d+(?=[.\]'\"]|$)")  # layer_0, layer1, not in a list
Names = tuple[str, ...]
"""The names of tensors."""

_select = torch.ops.aten.select.int


@dataclass
class Uses:
    """Uses of the tensors that do not grow in a program.

    Attributes:
        invariant: for each operation, whether it depends on no growing input.
        names: for each operation, the names of the sources its invariant operands are made of.
    """

    invariant: list[bool]
    names: list[tuple[str, ...]]


def uses(program: Program, growing: frozenset[str]) -> Uses:
    """Find the uses of every tensor that does not grow.

    Args:
        program: one run.
        growing: the names of the inputs that grow.
    """

    def known(leaf: Any, made_of: Sequence[Names | None]) -> Names | None:
        if type(leaf) is Val:
            return made_of[leaf.number]
        return names_of(program.sources[leaf.name], growing)

    # Parts of what is made of a tensor are of one that all layers may share, such as the matrices of experts.
    names, made_of = used_names(program.ops, known, stacks=Src)
    return Uses([each is not None for each in made_of], names)


def names_of(source: Source, growing: frozenset[str]) -> Names | None:
    """Return the names that uses of a tensor count for; None if it grows."""
    if not growing.isdisjoint(source.names):
        return None
    return source.names if source.kind != "constant" else ()


def used_names(
    ops: Sequence[Op], known: Callable[[Any, Sequence[Names | None]], Names | None], stacks: type = object
) -> tuple[list[Names], list[Names | None]]:
    """Return the names of the tensors that operations use.

    Args:
        ops: the operations.
        known: returns the names that an operand is made of, given those of earlier operations; None if it is made of
            more.
        stacks: kind of operands of which a part counts as one layer's.

    Returns:
        For each operation the names that its operands are made of, and those that its result is made of.
    """
    used: list[Names] = []
    made_of: list[Names | None] = []
    for op in ops:
        found = [known(leaf, made_of) for leaf in leaves(op.args) if isinstance(leaf, tuple)]
        names = tuple(dict.fromkeys(itertools.chain.from_iterable(filter(None, found))))
        used.append(names)
        # Taking one layer's part of a stack is no use of it: what then uses the part is.
        if op.target is _select and len(op.args) == 3 and op.args[1] == 0 and isinstance(op.args[0], stacks):
            names = tuple(f"{name}[{op.args[2]}]" for name in names)
        made_of.append(None if None in found else names)
    return used, made_of


@dataclass(frozen=True)
class Family:
    """The parameters of the layers: names that differ in one integer.

    Attributes:
        prefixes: what stands before the integer; more than one when several lists run side by side.
        layers: number of layers.
        first: the integer of the first layer.
        listed: whether they are in lists, and not only named so.
    """

    prefixes: tuple[str, ...]
    layers: int
    first: int = 0
    listed: bool = True

    def layer(self, names: Iterable[str]) -> int | None:
        """Return the one layer that names belong to; None if none or several.

        Names of several layers that differ in nothing else, as those of one tensor that these share, do not count.
        """
        alike: dict[str, set[int]] = {}
        for name in names:
            if (layer := self.layer_of(name)) is not None:
                alike.setdefault(self.template(name), set()).add(layer)
        found = set[int]().union(*(layers for layers in alike.values() if len(layers) == 1))
        return found.pop() if len(found) == 1 else None

    def layer_of(self, name: str) -> int | None:
        """Return the layer of a name."""
        found = self._found(name)
        return None if found is None else int(found[1].group()) - self.first

    def template(self, name: str) -> str:
        """Return the name with ``{l}`` for the layer."""
        found = self._found(name)
        if found is None:
            return name
        prefix, match = found
        number = f"l+{self.first}" if self.first else "l"
        return f"{prefix}{{{number}}}{name[match.end() :]}"

    def _found(self, name: str) -> tuple[str, re.Match[str]] | None:
        """Return the prefix of the name of a layer's parameter, and its integer."""
        for prefix in self.prefixes:
            match = _number(name, len(prefix)) if name.startswith(prefix) else None
            if match:
                return prefix, match
        return None


def _number(name: str, at: int) -> re.Match[str] | None:
    return _INTEGER.match(name, at) or _ENDING.match(name, at)


def template(family: Family | None, name: str) -> str:
    """Return the name with ``{l}`` for the layer, if it has one."""
    return family.template(name) if family else name


def find_family(counts: Counter[str], hint: str | None = None, parameters: Set[str] = frozenset()) -> Family | None:
    """Find the list of layers: the outermost list of parameters that takes part in most operations.

    Args:
        counts: how often each name is used.
        hint: the user's name for the list, ``model.layers``.
        parameters: the names of parameters: a list of them comes before one of other tensors.
    """
    members: dict[str, dict[int, int]] = {}
    lists: set[str] = set()
    for name, count in counts.items():
        for match in (*_INTEGER.finditer(name), *_ENDING.finditer(name)):
            prefix = name[: match.start()]
            if hint is None or prefix.rstrip(".[_") == hint or prefix.rpartition(".")[0] == hint:
                found = members.setdefault(prefix, {})
                found[int(match.group())] = found.get(int(match.group()), 0) + count
            if match.re is _INTEGER:
                lists.add(prefix)
    whole = {
        prefix: found
        for prefix, found in members.items()
        if sorted(found) == [n + _first(prefix, found, lists) for n in range(len(found))]
    }
    # Names that end in a number inside of a list's items, such as fc1 and fc2, are parts of a layer; so are lists of
    # tensors inside of what is numbered, such as those that torch keeps of the weights of rnn1 and rnn2.
    numbered = {prefix for prefix, found in whole.items() if prefix not in lists and len(found) > 1}

    def is_part(prefix: str) -> bool:
        around = numbered if prefix.endswith("[") else set() if prefix in lists else lists
        return any(prefix.startswith(other) for other in around)

    whole = {prefix: found for prefix, found in whole.items() if not is_part(prefix)}
    if not whole:
        return None
    # A list of one is a list only if there is no longer one, and a name that ends in a number only if there is no list.
    owned = {prefix for prefix in whole if any(name.startswith(prefix) for name in parameters)}

    def rank(prefix: str) -> tuple[bool, bool, bool, int, int]:
        found = whole[prefix]
        return len(found) > 1, prefix in owned, prefix in lists, sum(found.values()), -len(prefix)

    best = max(whole, key=rank)
    layers, first = len(whole[best]), min(whole[best])
    prefixes = [best]
    for prefix in sorted(whole, key=len):
        nested = any(prefix.startswith(other) or other.startswith(prefix) for other in prefixes)
        alike = len(whole[prefix]) == layers and min(whole[prefix]) == first and (prefix in lists) == (best in lists)
        if not nested and alike and layers > 1:
            prefixes.append(prefix)
    return Family(tuple(prefixes), layers, first, best in lists)


def _first(prefix: str, found: dict[int, int], lists: set[str]) -> int:
    """Return the integer of the first layer: people count attributes from 0 or from 1."""
    return 1 if prefix not in lists and min(found) == 1 else 0
