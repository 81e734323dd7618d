"""Assign a layer to each operation of the segments."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from fractions import Fraction
from typing import NamedTuple

import networkx as nx

from rmtc.errors import CaptureError
from rmtc.grouping import by_key
from rmtc.ir.program import Op, leaves
from rmtc.ir.segment_loop import Layout, Row
from rmtc.passes.fold.run import in_order, made_of, nesting

__all__ = ["Placement", "in_turn", "rising_subsequence"]


class _Counterpart(NamedTuple):
    """Two operations that do the same for two layers, the second of them so many layers above the first."""

    one: int
    other: int
    shift: int


class _GroupRead(NamedTuple):
    """A read of a group by another.

    Attributes:
        made, read: the groups.
        made_at, read_at: how many layers above the first of its group the operation is that makes the value, and the
            one that reads it. For a read in the same segment the first is their difference, and the second 0.
        back: how many segments back the value is made.
        of_cells: whether it depends on what layers compute.
    """

    made: int
    read: int
    made_at: int
    read_at: int
    back: int
    of_cells: bool


class Placement:
    """The layer of each operation: -1 for the prologue, L for the epilogue.

    Operations that use parameters of one layer are anchors. From an anchor and the one that stands for it in the next
    layer a walk leads to operands that stand for each other, and from these to what is made of them. Such operations
    are a group: they are placed together, each in its own layer.

        l0: h0 = lin(W0, x), a0 = tanh(h0) | l1: h1 = lin(W1, a0), a1 = tanh(h1)   ->   groups h0, h1 and a0, a1

    In a segment, nothing is in a lower layer than what it reads. What it reads of the segment before may be higher, by
    less than the pace, which is the number of steps from a segment to the next. The least pace is taken at which every
    operation has a layer, and none that a layer needs is above the one where its operands and its group would have it.
    For a pace of 1 it may be above. A pace of 0 is taken if then nothing is in a higher layer than for 1.

    Args:
        ops: the operations.
        reads: what each operation reads in the loop, with the number of its maker in ``ops``.
        others: further reads by reader: those of first segments, which stand where later ones do for later readers.
        anchors: the layers of operations that are known.
        templates: for each operation, the names of the parameters that it uses, with ``{l}`` for a layer's number.
        layers: the number of layers.

    Attributes:
        layer: the layer of each operation.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        reads: Sequence[Sequence[Row]],
        others: Mapping[int, Sequence[Row]],
        anchors: Mapping[int, int],
        templates: Sequence[tuple[str, ...]],
        layers: int,
    ) -> None:
        self._ops, self._operands, self._anchors, self._top = ops, reads, anchors, layers
        self._reads = [[*read, *others.get(i, ())] for i, read in enumerate(reads)]
        users = by_key((made, (i, back)) for i, read in enumerate(self._reads) for back, made in read)
        self._users = [users.get(i, []) for i in range(len(ops))]
        self._of_cells = made_of([[i for i, _ in some] for some in self._users], anchors)
        # What the anchors of a segment are made of in it, and what is made of them.
        self._needed = made_of([[made for back, made in read if not back] for read in self._reads], anchors)
        self._inside = made_of([[i for i, back in some if not back] for some in self._users], anchors)
        # What takes one of several results stays with what makes them.
        self._maker = [
            read[0].number if op.target is operator.getitem and read and not read[0].back else i
            for i, (op, read) in enumerate(zip(ops, reads, strict=True))
        ]
        kinds = [(op.target, nesting(op.args), template) for op, template in zip(ops, templates, strict=True)]
        links = _Counterparts(ops, kinds, reads, self._users, anchors).found
        self._group, self._at = list(self._maker), [0] * len(ops)
        self._low, self._high = dict[int, int](), dict[int, int]()
        free = [layers] * len(ops)
        # With the highest pace, operations are where their operands and the groups have them.
        self._join(links)
        own = [at if i in self._needed else layers for i, at in enumerate(self._settle(free, layers))]
        self._join([])
        # The pace is that which single operations allow. Sums that may all be behind the layers are taken apart.
        ways = [(own, 1), (free, 1), *((own, pace) for pace in range(2, layers + 1))]
        way = next(way for way in ways if not self._bound(*way))
        low = self._each(self._low)
        self._join(links)
        self._part(number for number, some in self._members.items() if min(low[i] for i in some) >= layers - 1)
        self.layer = self._settle(*way)
        if way[1] == 1 and not self._bound(self.layer, 0):  # all segments at once, layer by layer
            self.layer = self._settle(self.layer, 0)

    def arranged(self, ops: range) -> tuple[list[int], Layout]:
        """Return a segment's operations layer by layer, those of each in the order of the middle one's, and a layout.

        Args:
            ops: the operations.
        """
        own = by_key((self.layer[i], i) for i in ops)
        rank = {self._group[i]: n for n, i in reversed(list(enumerate(own.get((self._top - 1) // 2, ()))))}
        order: list[int] = []
        bounds = [0]
        for layer in range(-1, self._top + 1):
            behind, ranks = -1, dict[int, tuple[int, int]]()
            for i in own.get(layer, ()):
                behind = rank.get(self._group[i], behind)
                ranks[i] = behind, i
            read = {i: [j for back, j in self._operands[i] if not back and j in ranks] for i in ranks}
            order += in_order(ranks, read.__getitem__, ranks.__getitem__)
            bounds.append(len(order))
        prologue, *layers, epilogue = itertools.pairwise(bounds)
        return [i - ops.start for i in order], Layout(prologue, tuple(layers), epilogue)

    def _each(self, layer: Mapping[int, int]) -> list[int]:
        """Return the layer of each operation, given those of the groups."""
        return [layer[number] + at for number, at in zip(self._group, self._at, strict=True)]

    def _join(self, links: Iterable[_Counterpart]) -> None:
        """Make groups of all operations that are linked."""
        with_maker = (_Counterpart(made, i, 0) for i, made in enumerate(self._maker) if made != i)
        beside: dict[int, list[tuple[int, int]]] = {}
        for one, other, shift in itertools.chain(with_maker, links):
            beside.setdefault(one, []).append((other, shift))
            beside.setdefault(other, []).append((one, -shift))
        seen = set[int]()
        for number in range(len(self._ops)):
            work = [(number, 0)]
            while work:
                i, at = work.pop()
                if i not in seen:
                    seen.add(i)
                    self._group[i], self._at[i] = number, at
                    work += [(j, at + shift) for j, shift in beside.get(i, ())]
        self._connect()

    def _part(self, numbers: Iterable[int]) -> None:
        """Take groups apart."""
        for i in [i for number in numbers for i in self._members[number]]:
            self._group[i], self._at[i] = self._maker[i], 0
        self._connect()

    def _connect(self) -> None:
        """Find the members of groups, and the reads between groups, of which many are alike."""
        group, place = self._group, self._at
        self._members = by_key((number, i) for i, number in enumerate(group))
        edges = {
            (group[made], group[i], place[made], place[i], back, made in self._of_cells)
            if back
            else (group[made], group[i], place[made] - place[i], 0, 0, False)
            for i, read in enumerate(self._reads)
            for back, made in read
        }
        self._edges = by_key((end, edge) for edge in map(_GroupRead._make, edges) for end in {edge.made, edge.read})

    def _settle(self, limit: Sequence[int], pace: int) -> list[int]:
        """Choose the layers of all operations, and take groups apart for which there is none."""
        while lacking := self._bound(limit, pace):
            whole = {number for number in lacking if len({self._maker[i] for i in self._members[number]}) == 1}
            assert len(whole) < len(lacking), "single operations have layers, as anchors are in turn"
            self._part([max(lacking.keys() - whole, key=lambda number: (lacking[number], -number))])
        # Groups with one best choice come first, and single operations last: each choice may bound what is left.
        self._place(number for number in self._members if len(self._whole(number)) == 1)
        self._choose_together()
        self._place(self._members)
        return self._each(self._low)

    def _place(self, groups: Iterable[int], late: bool = False) -> None:
        """Place groups, and then what these read of the text and of earlier segments next to what needs it.

        Args:
            groups: the groups.
            late: whether to choose the highest of several best layers, else only for what is read of the text.
        """
        numbers = set(groups)
        given = {number for number in numbers if self._inside.isdisjoint(self._members[number])}
        for number in [*sorted(numbers - given, reverse=late), *sorted(given, reverse=True)]:
            best, low, high = self._whole(number), self._low[number], self._high[number]
            if best:
                chosen = best[-1] if late or number in given else best[0]
            elif number in given:
                # What the first layer needs is ahead of it, unless it is of a memory alone.
                memory = number in self._of_cells and all(back for back, _ in self._reads[number])
                ahead = low < 0 and high == 0 and not memory
                chosen = low if ahead else high
            else:
                chosen = high if low >= self._top - 1 else low  # of what is behind the layers only if it can be
            self._low[number] = self._high[number] = chosen
            self._spread([number])

    def _whole(self, number: int) -> list[int]:
        """Return the layers of a group that have the most of it in layers; none for a single operation."""
        places = {self._at[i] for i in self._members[number]}
        choices = range(self._low[number], self._high[number] + 1) if len(places) > 1 else ()
        inside = by_key((sum(0 <= at + place < self._top for place in places), at) for at in choices)
        return inside[max(inside)] if inside else []

    def _choose_together(self) -> None:
        """Place groups that layers need and that read each other as early or as late as they can be.

        The better way is that in which values go up fewer layers. A norm ahead of a layer is of that layer, for its
        operand goes there in any case, and a sum that ends a layer is of the layer that makes what it adds.
        """
        open_ = {number for number, some in self._members.items() if not self._needed.isdisjoint(some)}
        open_ = {number for number in open_ if len(self._whole(number)) > 1}
        edges = [(edge.made, edge.read) for made in open_ for edge in self._edges.get(made, ()) if not edge.back]
        graph: nx.Graph[int] = nx.Graph()
        graph.add_edges_from(edge for edge in edges if open_.issuperset(edge))
        graph.add_nodes_from(open_)
        for some in sorted(nx.connected_components(graph), key=min):
            low, high = self._low, self._high
            found: list[tuple[int, dict[int, int], dict[int, int]]] = []
            for late in (False, True):
                self._low, self._high = dict(low), dict(high)
                self._place(some, late)
                found.append((self._ways_up(some), self._low, self._high))
            _, self._low, self._high = min(found, key=lambda each: each[0])

    def _ways_up(self, groups: Set[int]) -> int:
        """Count the layers that values of groups go up in their segment, if what is open is as near as it can be."""

        def layer(i: int, bounds: Mapping[int, int]) -> int:
            return min(max(bounds[self._group[i]] + self._at[i], 0), self._top - 1)

        members = {i for number in groups for i in self._members[number]}
        values = {made for i in members for back, made in self._reads[i] if not back} | members
        ways = 0
        for value in values:
            at = layer(value, self._high)
            ways += max([at, *(layer(i, self._low) for i, back in self._users[value] if not back)]) - at
        return ways

    def _bound(self, limit: Sequence[int], pace: int) -> dict[int, int]:
        """Bound the layers of all groups.

        Args:
            limit: the highest layer of each operation that is no anchor.
            pace: the steps from segment to segment.

        Returns:
            The groups that have no layer, each with the number of layers that it lacks.
        """
        self._pace, self._low, self._high = pace, {}, {}
        for number, some in self._members.items():
            self._low[number] = max(self._anchors.get(i, -1) - self._at[i] for i in some)
            self._high[number] = min(self._anchors.get(i, limit[i]) - self._at[i] for i in some)
        self._spread(self._members)
        return {number: low - self._high[number] for number, low in self._low.items() if low > self._high[number]}

    def _spread(self, groups: Iterable[int]) -> None:
        """Raise the lowest layers of what reads groups, and lower the highest ones of what they read."""
        low, high, sizes = self._low, self._high, (self._pace, self._top)
        work = deque(groups)
        while work:
            for made, read, made_at, read_at, back, of_cells in self._edges.get(work.popleft(), ()):
                least = _above(low[made] + made_at, back, of_cells, *sizes) - read_at
                most = _below(high[read] + read_at, back, of_cells, *sizes) - made_at
                if least > low[read] <= high[read]:
                    low[read] = min(least, high[read] + 1)
                    work.append(read)
                if most < high[made] >= low[made]:
                    high[made] = max(most, low[made] - 1)
                    work.append(made)


@functools.cache
def _above(layer: int, back: int, of_cells: bool, pace: int, layers: int) -> int:
    """Return the lowest layer that can read what is made in a layer, so many segments later.

    A prologue that reads cells counts as layer 0, an epilogue as the last layer.
    """
    if not back or (layer < 0 and not of_cells):
        return layer
    least = min(max(layer, 0), layers - 1) - pace * back + 1
    return least if least > 0 else -1


@functools.cache
def _below(layer: int, back: int, of_cells: bool, pace: int, layers: int) -> int:
    """Return the highest layer in which can be made what a layer reads, so many segments later; -2 for none."""
    made = range(-1, layers + 1)
    return max((at for at in made if _above(at, back, of_cells, pace, layers) <= layer), default=-2)


class _Counterparts:
    """Finds what stands for operations in the next layer.

    Args:
        ops: the operations.
        kinds: what two operations have in common that stand for each other.
        reads: what each operation reads.
        users: the readers of each operation.
        anchors: the layers of operations that are known.

    Attributes:
        found: the links.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        kinds: Sequence[object],
        reads: Sequence[Sequence[Row]],
        users: Sequence[Sequence[tuple[int, int]]],
        anchors: Mapping[int, int],
    ) -> None:
        self._ops, self._kinds, self._reads, self._users = ops, kinds, reads, users
        self._of: dict[int, _Counterpart] = {}
        self._taken = set[int]()  # the second ones
        self._first: dict[int, int] = {}  # of a chain of links, by its last
        self._last: dict[int, int] = {}
        self._earlier: list[_Counterpart] = []  # pairs of what is read of earlier segments, to go on with
        self._sure: set[int] | None = None
        seeds: list[_Counterpart] = []
        for some in by_key((kinds[i], i) for i in sorted(anchors)).values():
            by_layer = sorted(by_key((anchors[i], i) for i in some).items())
            for (one, first), (other, second) in itertools.pairwise(by_layer):
                seeds += [_Counterpart(i, j, other - one) for i, j in zip(first, second, strict=False)]
        # What different lines of the user's code make stands for each other only if nothing else does. What is read of
        # earlier segments says less than the same segment: memories may be handed around.
        for _ in range(2):
            work = [*seeds, *(pair for link in self._of.values() for _, pair in self._operands(link))]
            while work:
                self._walk(work)
                known = -1
                while len(self._of) > known:
                    known = len(self._of)
                    for i in range(len(ops)):
                        if i not in self._of and (link := max(self._along_uses(i), default=None)) is not None:
                            self._walk([link[-1]])
                work, self._earlier = self._earlier, []
            self._sure = {*self._of, *self._taken}
        self.found = list(self._of.values())

    def _fits(self, link: _Counterpart) -> bool:
        """Tell whether two operations may stand for each other: none for itself, or for one that stands for it."""
        one, other, _ = link
        if one in self._of or other in self._taken:
            return self._of.get(one) == link
        if self._kinds[one] != self._kinds[other] or self._first.get(one, one) == other:
            return False
        here = self._ops[one].location == self._ops[other].location
        return here or (self._sure is not None and self._sure.isdisjoint((one, other)))

    def _walk(self, links: Iterable[_Counterpart]) -> None:
        """Add links, and those of the operands."""
        work = deque(links)
        while work:
            link = work.popleft()
            if link.one not in self._of and self._fits(link):
                self._of[link.one] = link
                self._taken.add(link.other)
                first, last = self._first.get(link.one, link.one), self._last.get(link.other, link.other)
                self._first[last], self._last[first] = first, last
                for back, pair in self._operands(link):
                    (self._earlier if back else work).append(pair)

    def _operands(self, link: _Counterpart) -> list[tuple[int, _Counterpart]]:
        """Return the pairs of operands that are made as many segments before, each with the number of these."""
        return [
            (one.back, _Counterpart(one.number, other.number, link.shift))
            for one, other in zip(self._reads[link.one], self._reads[link.other], strict=False)
            if one.back == other.back
        ]

    def _along_uses(self, i: int) -> Iterator[tuple[bool, int, int, _Counterpart]]:
        """Yield what may stand for an operation, as it reads what stands for its operands, the best as the highest."""
        for _, operand in self._reads[i]:
            made = self._of.get(operand)
            for j, _ in self._users[made.other] if made else ():
                link = _Counterpart(i, j, made.shift if made else 0)
                if not self._fits(link):
                    continue
                pairs = [pair for _, pair in self._operands(link)]
                same = [pair for pair in pairs if pair.one == pair.other or self._fits(pair)]
                here = self._ops[i].location == self._ops[j].location
                known = any(self._of.get(pair.one) == pair for pair in pairs)
                if known and (here or len(same) == len(self._reads[i]) == len(self._reads[j])):
                    yield here, len(same), -j, link


def in_turn(row: Sequence[Op], names: Mapping[int, tuple[str, ...]], layer_at: Mapping[int, int]) -> dict[int, int]:
    """Keep the anchors of a segment whose layers can run one after another, and drop uses of another's parameter.

        l0: W0 | l1: W1, w3 | l2: W2 | l3: W3, w3   ->   l0: W0 | l1: W1 | l2: W2 | l3: W3, w3

    Each parameter has one vote for where its layer is, divided among its uses.

    Args:
        row: the operations.
        names: for each anchor, the names of the parameters of its layer that it uses.
        layer_at: the layer of each anchor.

    Raises:
        CaptureError: if a layer has no anchor left, or half the layers or more use as many parameters out of turn as
            in turn: such layers do not run one after another.
    """
    inside = [[leaf.number for leaf in leaves(op.args) if isinstance(leaf, Row) and not leaf.back] for op in row]
    above: list[int] = []  # the highest layer that each is made of
    for i, read in enumerate(inside):
        above.append(max([layer_at.get(i, -1), *(above[j] for j in read)]))
    below = [layer_at.get(i, len(row)) for i in range(len(row))]  # the lowest layer of what is made of each
    for i in reversed(range(len(row))):
        for j in inside[i]:
            below[j] = min(below[j], below[i])
    mixed = [i for i in sorted(layer_at) if not above[i] == layer_at[i] == below[i]]
    votes = Counter(names.values())
    rising = rising_subsequence([layer_at[i] for i in mixed], [Fraction(1, votes[names[i]]) for i in mixed])
    kept = (layer_at.keys() - mixed) | {mixed[k] for k in rising}
    used = by_key(((layer_at[i], i in kept), name) for i in sorted(layer_at) for name in dict.fromkeys(names[i]))
    layers = set(layer_at.values())
    astray = {layer for layer in layers if len({*used.get((layer, False), ())}) >= len({*used.get((layer, True), ())})}
    if 2 * len(astray) >= len(layers) or any((layer, True) not in used for layer in layers):
        place = next(i for i in sorted(layer_at) if i not in kept and layer_at[i] in astray)
        raise CaptureError(
            f"the layers of a segment do not run one after another: layer {layer_at[place]} runs here out of turn",
            location=row[place].location,
            remedy="name the list of layers with layers=...",
        )
    return {i: layer_at[i] for i in sorted(kept)}


def rising_subsequence(values: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """Return the places of a heaviest subsequence that never falls; of several, one with the most different values.

    Args:
        values: numbers from 0.
        weights: the weight of each, above 0.
    """
    # By the last value: the weight, the number of different values, and the places, the last one first.
    best: dict[int, tuple[Fraction, int, list[int]]] = {-1: (Fraction(0), 0, [])}
    for place, value in enumerate(values):
        weight, different, places = max(
            (weight, different + (end < value), places)
            for end, (weight, different, places) in best.items()
            if end <= value
        )
        best[value] = (weight + weights[place], different, [place, *places])
    return max(best.values())[2][::-1]
