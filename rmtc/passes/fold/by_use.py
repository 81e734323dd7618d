"""Order the operations of a segment by use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import networkx as nx

from rmtc.errors import RefusedError
from rmtc.passes.fold.run import made_of, ranks

T = TypeVar("T")


def by_use(
    row: list[int],
    read: Sequence[Iterable[int]],
    anchors: Set[int],
    inner: Mapping[int, int],
    handed: Set[int],
    taken: Mapping[int, Sequence[int]],
) -> list[int]:
    """Order the operations of a segment so that those of one layer lie side by side.

    An operation that no later anchor needs runs as soon as its operands exist. A memory that the code writes after all
    layers then lies next to the layer that it belongs to. An operation that runs before the first layer, but serves
    only later layers of the same segment, waits for them.

        l0, l1, write m0, write m1   ->   l0, write m0, l1, write m1

    Args:
        row: the operations, in an order in which they can run.
        read: what each operation reads.
        anchors: the operations that use parameters.
        inner: the layers of those that use the parameters of one layer.
        handed: the operations that later segments read.
        taken: the operations that take one of several results, by what makes these: they follow it at once.
    """
    inside = set(row)
    inputs = {i: [j for j in dict.fromkeys(read[i]) if j in inside] for i in row}
    users: dict[int, list[int]] = {}
    for i in row:
        for j in inputs[i]:
            users.setdefault(j, []).append(i)
    rank, latest = ranks(row, inputs, {i: i for i in anchors})
    needed = {i for i in row if i in anchors or latest[i] > rank[i]}
    loose = {i for i in row if latest[i] < 0}
    waiting = {i: sum(j not in loose or i in handed for j in inputs[i]) for i in row}
    done: dict[int, None] = {}

    def emit(goal: int) -> None:
        work = [goal]
        while work:
            i = work[-1]
            missing = [j for j in inputs[i] if j not in done]
            if i in done or missing:
                work.pop() if i in done else work.extend(reversed(missing))
                continue
            group = [work.pop(), *(part for part in taken.get(i, ()) if part in inside)]
            done.update(dict.fromkeys(group))
            ready = []
            for made, user in [(one, user) for one in group for user in users.get(one, ())]:
                if made in loose and user not in handed:
                    continue
                waiting[user] -= 1
                if not waiting[user] and user not in needed and user not in done:
                    ready.append(user)
            work.extend(reversed(ready))

    turns = [i for i in row if i in inner]
    start = min(turns or (i for i in row if i in anchors), default=0)
    begun = next((k for k, i in enumerate(turns) if inner[i] != inner[turns[0]]), len(turns)) + 1
    # The first layer may be the reader, also that of a later segment.
    early = made_of(inputs, inside & {start, *turns[:begun], *(i for i in row if i < start and i in handed)})
    late = {i for i in row if i < start and i in needed and i not in early}
    for i in (*(i for i in row if (i in needed and i not in late) or i in loose), *row):
        emit(i)
    return list(done)


def in_order(nodes: Iterable[T], read: Callable[[T], Iterable[T]], rank: Callable[[T], Any]) -> list[T]:
    """Return nodes in the order of their ranks, but each after what it reads.

    Raises:
        RefusedError: if two wait for each other.
    """
    ranked = sorted(nodes, key=rank)
    reads = {node: list(read(node)) for node in ranked}
    place = {node: at for at, node in enumerate(ranked)}
    if all(place.get(each, len(ranked)) < at for at, node in enumerate(ranked) for each in reads[node]):
        return ranked
    graph: nx.DiGraph[T] = nx.DiGraph()
    graph.add_nodes_from(ranked)
    graph.add_edges_from((each, node) for node in ranked for each in reads[node])
    try:
        return list(nx.lexicographical_topological_sort(graph, rank))
    except nx.NetworkXUnfeasible:
        raise RefusedError("operations of a segment read what later segments make") from None
