"""Pass remake-constants: constants that a segment makes of nothing, such as a mask of `ones`, made where they are read.

Needs: a graph of operations that change nothing.
Gives: the same, in which a constant of the loop is made anew for each layer that reads it. A constant is of the loop if
it is made after the first use of a parameter, and between two uses. A constant that is put together of earlier ones, as
the mask of what a window holds, is a memory.

Nothing but its readers tells to which segment such a constant belongs.

    m = tril(ones(4, 4)); a = linear(x, w0) * m; b = linear(a, w1) * m
        ->   m = tril(ones(4, 4)); a = linear(x, w0) * m; m' = tril(ones(4, 4)); b = linear(a, w1) * m'
"""

from __future__ import annotations

import torch
from torch import fx

from rmtc.passes.registry import enter


@enter("remake-constants", "constants of a loop made where they are read, if none is found without that")
class RemakeConstants:
    """The pass remake-constants, whose contract the module states."""

    def apply(self, graph: fx.Graph) -> None:
        """Make constants of the loop anew for their readers.

        Readers between two uses of parameters share one copy.

        Args:
            graph: the graph, which is changed.
        """
        made = constants(graph)
        copies: dict[fx.Node, fx.Node] = {}  # for readers up to the next use of a parameter
        for node in list(graph.nodes):
            if node in made or node.op != "call_function":
                continue
            for source in node.all_input_nodes:
                if source in made:
                    with graph.inserting_before(node):
                        node.replace_input_with(source, _remade(graph, source, copies))
            if _uses_parameter(node):
                copies.clear()
        for node in reversed(list(graph.nodes)):
            if node in made and not node.users:
                graph.erase_node(node)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the constants of the loop, and those like them that the first segment makes."""
    when: dict[fx.Node, int] = {}  # number of uses of parameters before each constant
    kinds = set[object]()
    begun = 0
    for node in graph.nodes:
        begun += _uses_parameter(node)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "call_function" and not random and all(when.get(each) == begun for each in node.all_input_nodes):
            when[node] = begun
            kinds |= {_kind(node)} if begun else set()
    return {node for node in when if _kind(node) in kinds}


def _kind(node: fx.Node) -> object:
    return node.target, node.meta.get("location")


def _uses_parameter(node: fx.Node) -> bool:
    return any(each.op == "placeholder" and each.meta["source"][0] == "parameter" for each in node.all_input_nodes)


def _remade(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in copies:
        for source in node.all_input_nodes:
            _remade(graph, source, copies)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies[node]
