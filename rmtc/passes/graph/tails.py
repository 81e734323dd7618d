"""Tails: reads that are others in a shorter last segment, or at the rest of a text, and stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import fx

from rmtc.ir.program import VIEWS
from rmtc.passes.graph.joins import joins
from rmtc.passes.graph.regions import (
    END,
    MOVES,
    NEW,
    SCATTERS,
    are_disjoint,
    argument,
    dim_of,
    dim_of_read,
    is_within,
    read_by,
    size_of,
    written_by,
)

aten = torch.ops.aten
_OF_SIZES = (*NEW, aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.new_empty.default)


class Slices(NamedTuple):
    """The slices of some runs, by place and by the size of what they are of.

    Attributes:
        whole: those that take all of a tensor.
        less: those that take less.
        beyond: places of those up to a position that a tensor does not reach.
    """

    whole: frozenset[tuple[str, int]] = frozenset()
    less: frozenset[tuple[str, int]] = frozenset()
    beyond: frozenset[str] = frozenset()

    def of(self, graph: fx.Graph, texts: Set[tuple[str, int]] = frozenset()) -> Slices:
        """Return these slices and those of a graph.

        Args:
            graph: the graph.
            texts: names of texts that may have a rest that makes no segment, and the dimensions that are their lengths.
                A slice of all of a part of such a text takes less if there is a rest.
        """
        whole, less, beyond = set(self.whole), set(self.less), set(self.beyond)
        for node in graph.nodes:
            if node.target is aten.slice.Tensor and isinstance(node.args[0], fx.Node):
                read, dim = read_by(node), dim_of(node, 1)
                if read.step == 1:
                    every = _last_written(node, read)
                    (whole if read == every else less).add((place_of(node), len(every)))
                    if read == every and every.stop < (argument(node, 3, "end", None) or 0) < END:
                        beyond.add(place_of(node))
                    if not texts.isdisjoint((name, dim) for name in _sliced(node.args[0]).meta.get("names", ())):
                        less.add((place_of(node), len(every)))
        return Slices(frozenset(whole), frozenset(less), frozenset(beyond))

    @property
    def cut(self) -> frozenset[str]:
        """The places of slices that take all of some tensors, and less of others of the same size.

        Such is a table of which a shorter last segment takes less, or a result of padding that it cuts. So is a slice
        up to a position that a tensor does not reach, as that of a shorter last segment, and that takes less of longer
        ones.
        """
        return frozenset(place for place, _ in self.whole & self.less) | (
            self.beyond & {place for place, _ in self.less}
        )


def open_ends(graph: fx.Graph, texts: Set[tuple[str, int]]) -> None:
    """Let slices that take what is left of a text, as much as they ask for or less, take all up to its end.

    Then they are none of the slices of other segments.

        slice(text, 1, 18, 24), of 21 positions   ->   slice(text, 1, 18, END)

    Args:
        graph: the graph.
        texts: names of texts, and the dimensions that are their lengths.
    """
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and isinstance(node.args[0], fx.Node):
            end, dim = argument(node, 3, "end", None) or 0, dim_of(node, 1)
            whole = not texts.isdisjoint((name, dim) for name in _sliced(node.args[0]).meta.get("names", ()))
            if size_of(node.args[0], dim) - whole < end < END:
                node.args = (*node.args[:3], END, *node.args[4:])


def _last_written(node: fx.Node, read: range) -> range:
    """Return the places that one write made last, if a slice reads no others; or those of the whole tensor."""
    source: Any = node.args[0]
    while source.target is aten.slice_scatter.default and dim_of(source, 2) == dim_of(node, 1):
        written = written_by(source)
        if read and written.step == 1 and is_within(read, written):
            return written
        if not are_disjoint(read, written):
            break
        source = source.args[0]
    return range(size_of(source, dim_of(node, 1)))


def _sliced(node: fx.Node) -> fx.Node:
    """Return the tensor that a slice, or a slice of slices, is of."""
    while node.target in (aten.alias.default, aten.slice.Tensor):
        node = node.all_input_nodes[0]
    return node


def place_of(node: fx.Node) -> str:
    """Return the line of the user's code and the module that a slice or selection is of, and its dimension."""
    place = node.meta.get("location")
    line = "" if place is None else f"{place.file}:{place.line}"
    return f"{line} {node.meta.get('module', '')} {dim_of_read(node)}"


def joined_with(graph: fx.Graph, length: int) -> set[Any]:
    """Return the lines of the user's code that put a part of some length to what is no longer."""
    found, longer = set[Any](), set[Any]()
    for place, pieces in joins(graph):
        sizes = [size for _, size in pieces]
        if sum(sizes) > 2 * length:
            longer.add(place)
        elif length in sizes:
            found.add(place)
    return found - longer


def mark_texts(graph: fx.Graph, texts: Mapping[str, int]) -> None:
    """Note at each node that is made of texts and constants alone from which size it counts as a text.

    It is 0 for what is made of constants, and for a tensor of constants to which parts of texts are written.
    """
    for node in graph.nodes:
        sizes = [source.meta.get("text", -1) for source in node.all_input_nodes] or [0]
        if node.op == "placeholder":
            sizes = [texts[name] for name in node.meta.get("names", ()) if name in texts] or [-1]
        elif node.target in _OF_SIZES:
            sizes = [0]
        if min(sizes) < 0:
            continue
        whole: Any = node.args[1] if node.target is aten.slice_scatter.default else None
        if node.target in SCATTERS and not (isinstance(whole, fx.Node) and _is_text(whole, dim_of(node, 2))):
            sizes = sizes[:1]
        node.meta["text"] = max(sizes)


def _is_text(node: fx.Node, dim: int) -> bool:
    """Tell whether a tensor is made of texts and constants alone and as long as a text, but for less than a segment."""
    least, value = node.meta.get("text", 0), node.meta["val"]
    return bool(least) and value.ndim > dim and value.shape[dim] >= least


def may_be_another(node: fx.Node, source: fx.Node, dim: int, to_the_end: bool, windows: set[Any]) -> bool:
    """Tell whether a read may be of another part in a shorter last segment, or of what is added to a text."""
    if source.target in SCATTERS and dim_of(source, 2) == dim:
        return any(isinstance(each, fx.Node) and _is_text(each, dim) for each in source.args[:2])
    if source.target is aten.cat.default and dim_of(source, 1) == dim:
        ends = source.meta.get("location") in windows or (is_end(node) and is_given(node))
        return (to_the_end and ends) or any(_is_text(piece, dim) for piece in source.args[0])  # type: ignore[union-attr, arg-type]
    return False


def is_end(node: fx.Node) -> bool:
    """Tell whether a slice takes the last positions, however many there are."""
    start = argument(node, 2, "start", None) if node.target is aten.slice.Tensor else None
    return start is not None and start < 0


def is_given(node: fx.Node) -> bool:
    """Tell whether a value, or a view or copy of it, is a result and nothing else."""
    return all(
        user.op == "output" or ((user.target in VIEWS or user.target in MOVES) and is_given(user))
        for user in node.users
    )
