"""Find the parameters that operations use, and the layer that each parameter belongs to."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from rmtc.grouping import by_key
from rmtc.ir.program import Op, Source, Src, leaves

__all__ = ["Family", "Names", "find_family", "given", "template", "uses"]

_NUMBER = re.compile(
    r"(?:(?<=^)|(?<=[.\[]))\d+(?=[.\]]|$)"  # layers.0, in a list
    r"|(?<=[A-Za-z_])\d+(?=[.\]'\"]|$)"  # layer_0, layer1, not in a list
)
Names = tuple[str, ...]
"""The names of tensors."""

_select = torch.ops.aten.select.int


def given(sources: Mapping[str, Source], growing: Set[str]) -> dict[Any, Names]:
    """Return the names that uses of each tensor that exists before the call count for, but for inputs that grow."""
    return {
        Src(name): source.names if source.kind != "constant" else ()
        for name, source in sources.items()
        if growing.isdisjoint(source.names)
    }


def uses(ops: Sequence[Op], made_of: dict[Any, Names], result: Callable[[int], Any]) -> list[Names]:
    """Return, for each operation, the names of the tensors that its operands are made of.

    Args:
        ops: the operations.
        made_of: the names of the tensors that operands are made of, if of nothing else. What the operations make is
            added.
        result: the operand that the result of an operation is.
    """
    used: list[Names] = []
    for number, op in enumerate(ops):
        found = [made_of.get(leaf) for leaf in leaves(op.args) if isinstance(leaf, tuple)]
        names = tuple(dict.fromkeys(itertools.chain.from_iterable(filter(None, found)))) if any(found) else ()
        used.append(names)
        # Taking one layer's part of a stack is no use of it: what then uses the part is. Parts of what is made of a
        # tensor are of one that all layers may share, such as the matrices of experts.
        if op.target is _select and len(op.args) == 3 and op.args[1] == 0 and isinstance(op.args[0], Src):
            names = tuple(f"{name}[{op.args[2]}]" for name in names)
        if None not in found:
            made_of[result(number)] = names
    return used


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
        alike = by_key(map(self.place, names))
        found = {layers[0] for layers in alike.values() if len(set(layers)) == 1} - {None}
        return found.pop() if len(found) == 1 else None

    def place(self, name: str) -> tuple[str, int | None]:
        """Return a name with ``{l}`` for the layer, and the layer; the name itself and None if it has none."""
        for prefix in self.prefixes:
            if name.startswith(prefix) and (match := _NUMBER.match(name, len(prefix))):
                number = f"l+{self.first}" if self.first else "l"
                return f"{prefix}{{{number}}}{name[match.end() :]}", int(match[0]) - self.first
        return name, None


def template(family: Family | None, name: str) -> str:
    """Return the name with ``{l}`` for the layer, if it has one."""
    return family.place(name)[0] if family else name


def find_family(counts: Counter[str], hint: str | None = None, parameters: Set[str] = frozenset()) -> Family | None:
    """Find the list of layers: the outermost list of parameters that takes part in most operations.

    Args:
        counts: how often each name is used.
        hint: the user's name for the list, ``model.layers``.
        parameters: the names of parameters: a list of them comes before one of other tensors.
    """
    members: dict[str, Counter[int]] = {}
    lists: set[str] = set()
    for name, count in counts.items():
        for match in _NUMBER.finditer(name):
            prefix = name[: match.start()]
            if hint is None or prefix.rstrip(".[_") == hint or prefix.rpartition(".")[0] == hint:
                members.setdefault(prefix, Counter())[int(match[0])] += count
            if prefix[-1:] in (*".[", ""):
                lists.add(prefix)
    # People count attributes from 0 or from 1.
    whole = {
        prefix: found
        for prefix, found in members.items()
        if max(found) - min(found) == len(found) - 1 and min(found) in ((0,) if prefix in lists else (0, 1))
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
