"""Pass canonicalize: one spelling for what can be written in several ways."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtc.ir.program import SPLITS, draws
from rmtc.passes.graph.detaches import detach_at_readers, detach_parts, drop_detached
from rmtc.passes.graph.joins import drop_empty, flatten, stack_rows
from rmtc.passes.graph.layouts import ANY_CAST, BY_LAYOUT, SHAPES, drop_cast, lay_out, refuse_strides, unview
from rmtc.passes.graph.reads import forward, merge_parts, short_histories, spread
from rmtc.passes.graph.regions import SCATTERS, dim_of, piece_of, size_of, written_by
from rmtc.passes.graph.replacements import drop_dead, replace, replace_if_alike, respell
from rmtc.passes.graph.results import keep_apart, memories, unalias
from rmtc.passes.graph.tails import is_end, joined_with, mark_texts
from rmtc.passes.graph.writes import assemble, name_places, take_turns, write_to_copied
from rmtc.passes.registry import enter

aten = torch.ops.aten
_NO_RESULT = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.dropout.default, operator.getitem)


@enter("canonicalize", "one spelling for parts of tensors; reads see through writes")
@dataclass(frozen=True)
class Canonicalize:
    """Drop operations that compute nothing, and name parts of tensors directly.

    Needs: a functional graph without regions.
    Gives: a graph in which a piece of `split`, `chunk` and `unbind` is a `slice` or `select`
    of its source, and checks of metadata are gone. A read of a part that a `stack`, `cat`, `select_scatter`,
    `slice_scatter` or `index_put` at constant places wrote is that part, also after a `roll`, a `flip` or an index of
    constants. One tensor that holds the states of many layers then makes no false chain between them.
    An operation that reads memory as it lies, such as `view_as_complex`, reads a contiguous tensor.
    Views and copies that nothing uses go. Other operations stay, so that the last segment looks like the others.
    Checks: no operation reads memory by strides that the user's code gives.

        %p = split(%x, 16, 1)
        %a = getitem(%p, 2)                     ->    %a = slice(%x, 1, 32, 48)
        %w = select_scatter(%buffer, %v, 0, 3)
        %b = select(%w, 0, 3)                   ->    uses of %b become %v

    A tensor that is written part by part and read as a whole is put together where it is read, from the last writes.
    Writes that a later one covers make no dependence. Where parts that are written again and again overlap, a read is
    divided at their ends. A tensor is detached where it is read, so that a reader waits for its producer and not for
    the layer that kept it.

    A slice of a whole dimension is its source, except on the lines of ``cut``: there a shorter last segment takes less.

        %n = slice(%positions, 0, 0, 16)        stays: the last segment takes slice(%positions, 0, 0, 5)
        %h = slice(%hidden, 1, 0, 16)     ->    %hidden

    A piece of a concatenation that is empty each time stays if it is one of ``filled``: in other runs it is not.

    Given the length of ``windows``, a read of the end of a concatenation with a part of that length stays a read. A
    window of the last positions is the segment itself if that fills it. A shorter last segment does not, and its window
    also has the end of the window before.

    ``texts`` gives for each text the size from which a part of it counts as the text. Parts of a text that is padded,
    or written to, with values made of texts alone stay parts of the result: the last segment may hold some of what was
    added.

        labels = cat([text[:, 1:], ends], 1)
        %t = slice(labels, 1, 16, 24)           stays, and so does slice(labels, 1, 0, 8)

    Where ``gradients`` are asked for, ``detach`` is an operation.
    """

    windows: int | None = None
    cut: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()
    histories: bool = True
    texts: Mapping[str, int] = field(default_factory=dict)
    gradients: bool = False

    def apply(self, graph: fx.Graph) -> bool:
        """Change a graph; returns whether it has a history that is read part by part."""
        refuse_strides(graph)
        memory = memories(graph)
        # Note what is a text, a window, or written in turns: later steps ask for that.
        mark_texts(graph, self.texts)
        drop_empty(graph, self.filled)
        name_places(graph)
        turns = take_turns(graph)
        windows = set() if self.windows is None else joined_with(graph, self.windows)
        # Give each operation its one spelling.
        short = self._short(graph, windows)
        by_parts = False
        for node in list(graph.nodes):
            if node.op == "call_function":
                by_parts |= self._respell(graph, node, windows, short, turns)
        drop_dead(graph)
        # Put together what was written, and read its parts.
        assemble(graph, turns)
        by_parts |= self._read_parts(graph, windows, turns)
        # Detach at readers, and give results memory of their own.
        detach_at_readers(graph)
        drop_detached(graph)
        merge_parts(graph)
        keep_apart(graph, memory)
        _drop_unused(graph)
        return by_parts

    def _short(self, graph: fx.Graph, windows: Set[Any]) -> set[Any]:
        return short_histories(graph) - windows if self.histories else set()

    def _respell(self, graph: fx.Graph, node: fx.Node, windows: set[Any], short: Set[Any], turns: Set[fx.Node]) -> bool:
        """Give an operation its one spelling; returns whether it read a history, and its parts are read instead."""
        if (found := piece_of(node)) is not None:
            respell(graph, node, found[0], *found[1])
            if node.target is aten.narrow.default:
                graph.erase_node(node)
        elif node.target is aten.slice_scatter.default and len(written_by(node)) == size_of(node, dim_of(node, 2)):
            replace_if_alike(graph, node, node.args[1])
        elif node.target in SCATTERS:
            write_to_copied(node)
        elif node.target in (aten.select.int, aten.slice.Tensor):
            if not is_end(node):  # whether that is a result is not clear yet
                forward(graph, node, self.cut, windows)
                return spread(graph, node, short, turns)
        elif node.target in SHAPES:
            unview(graph, node)
        elif node.target is aten.alias.default or (node.target is aten.detach.default and not self.gradients):
            unalias(graph, node)
        elif node.target is aten.cat.default:
            flatten(graph, node)
        elif node.target is aten.copy.default:
            replace_if_alike(graph, node, node.args[1])
        elif node.target in ANY_CAST:
            drop_cast(graph, node)
        elif node.target in BY_LAYOUT:
            lay_out(graph, node)
        elif node.target is aten.dropout.default and not draws(node.target, node.args, node.kwargs):
            replace(node, node.args[0])
        return False

    def _read_parts(self, graph: fx.Graph, windows: set[Any], turns: Set[fx.Node]) -> bool:
        """Read what was put together part by part, until none is left; returns whether a history was."""
        by_parts, again = False, True
        while again:
            detach_parts(graph)
            short = self._short(graph, windows)
            again = False
            for node in list(graph.nodes):
                if node.target in (aten.select.int, aten.slice.Tensor):
                    forward(graph, node, self.cut, windows)
                    again |= spread(graph, node, short, turns)
            drop_dead(graph)
            for node in list(graph.nodes):
                if node.target is aten.cat.default:
                    by_parts |= flatten(graph, node, short)
                    stack_rows(graph, node)
            drop_dead(graph)
            by_parts |= again
        return by_parts


def _drop_unused(graph: fx.Graph) -> None:
    """Drop checks and pieces that nothing uses, and write each view as a `reshape`."""
    for node in reversed(list(graph.nodes)):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # of values: other strides than a fake has need a copy
        unused = not node.users and (node.target in (*_NO_RESULT, *SPLITS, *ANY_CAST) or node.op == "get_attr")
        if unused and not _stays(node):
            graph.erase_node(node)


def _stays(node: fx.Node) -> bool:
    """Tell whether one of several results stays though nothing uses it.

    All results of an operation stay, in each segment, whichever of them it uses. Views go if none of them is used.
    """
    if node.target is not operator.getitem:
        return False
    source = node.all_input_nodes[0]
    return source.target not in SPLITS or any(part.users for part in source.users)
