"""Pass find-segments: which segment each operation of a run belongs to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rmtc.errors import CaptureError, VerifyError
from rmtc.ir.program import VIEWS, Op, Program, Src, Val, leaves, map_leaves, parts
from rmtc.passes.fold.cuts import common_subsequence, divide
from rmtc.passes.fold.streams import Uses
from rmtc.passes.registry import register

__all__ = ["Segmented", "find_segments", "reorder"]


@dataclass
class Segmented:
    """A run with its operations in the order before, segment 0, 1, ..., after.

    Attributes:
        program: the run, reordered.
        starts: where each segment starts; then where the last one ends.
    """

    program: Program
    starts: list[int]

    def verify(self) -> None:
        """Check the program, and that each segment starts where the one before ends, or later.

        Raises:
            VerifyError: otherwise: an error of rmtc's.
        """
        self.program.verify()
        if self.starts != sorted(self.starts) or self.starts[-1] > len(self.program.ops):
            raise VerifyError(f"segments of {len(self.program.ops)} operations start at {self.starts}")

    def __str__(self) -> str:
        return f"# {len(self.starts) - 1} segments start at {self.starts}\n{self.program}\n"

    def segment(self, index: int) -> int:
        """The segment of an operation: -1 before the loop, S after it."""
        segments = len(self.starts) - 1
        if index < self.starts[0]:
            return -1
        for segment in range(segments):
            if index < self.starts[segment + 1]:
                return segment
        return segments


def _key(value: Op) -> tuple[object, ...]:
    return (value.target, *(len(arg) if type(arg) is tuple else 0 for arg in value.args))


@register("find-segments", "each operation filed in a segment, before the loop or after it")
def find_segments(
    program: Program, use: Uses, anchors: dict[int, int], inner: dict[int, int], segments: int
) -> Segmented:
    """Divide a run into segments.

    Needs: a canonical program, and its anchors: operations whose segment is known from the parameter they use.
    Gives: the run with every operation filed in a segment, or before or after the loop. What was computed before the
    loop for one segment (a slice of the text) moves to that segment, what was computed after it for one segment moves
    back, what every segment shares moves before the loop.
    Checks: the anchors of the layers come segment by segment.

        slice0 slice1 | f(slice0) | f(slice1)   ->   | slice0 f(slice0) | slice1 f(slice1) |

    Args:
        program: the run.
        use: its uses of parameters.
        anchors: the segment of each anchor.
        inner: the anchors that use parameters of one layer, and which it is.
        segments: number of segments.

    Raises:
        CaptureError: if the layers of one segment run after those of the next have begun.
    """
    order = sorted(inner) if inner else sorted(anchors)
    if any(anchors[a] > anchors[b] for a, b in itertools.pairwise(order)):
        program, moved = _segment_major(program, use, anchors)
        use = Uses([use.invariant[i] for i in moved], [use.names[i] for i in moved], {})
        place = {old: new for new, old in enumerate(moved)}
        anchors = {place[i]: s for i, s in anchors.items()}
        inner = {place[i]: layer for i, layer in inner.items()}
    chosen = set(inner or anchors)
    _check_told_apart(anchors, chosen, segments)
    program, moved, shared = _gather(program, use, anchors, chosen, segments)
    place = {old: new for new, old in enumerate(moved)}
    anchors = {place[i]: s for i, s in anchors.items() if i not in shared}
    chosen = {place[i] for i in chosen if i not in shared}
    inner = {place[i]: layer for i, layer in inner.items() if i not in shared}
    _check_told_apart(anchors, chosen, segments)
    names = [use.names[i] for i in moved]
    first = [min(i for i in chosen if anchors[i] == s) for s in range(segments)]
    last = [max(i for i in chosen if anchors[i] == s) for s in range(segments)]
    if any(last[s] >= first[s + 1] for s in range(segments - 1)):
        bad = program.ops[first[1]]
        raise CaptureError(
            "the segments do not run one after another: their layers interleave in a way that is not known",
            location=bad.location,
            remedy="run the layers of one segment before those of the next, or pass layers=... to name the layers",
        )
    # The first segment may make of a parameter what later ones make of a memory: only anchors are told by names.
    tokens = [(_key(op), names[i] if i in anchors else ()) for i, op in enumerate(program.ops)]
    reach = list(range(len(program.ops)))
    for i, op in enumerate(program.ops):
        for j in _inputs(op):
            reach[j] = i
    starts, head, tail = divide(tokens, first, last, reach, anchors)
    own = range(first[0], starts[0] if starts else last[0] + 1)
    invariant = [use.invariant[i] for i in moved]
    opening = _match_head(program, tokens, own, head, invariant)
    if segments > 1:  # as the one before it ends: the first ones may end otherwise, while a memory fills
        tail = tokens[last[-2] + 1 : starts[-1]]
    closing = _match_tail(program, tokens, range(last[-1] + 1, len(program.ops)), tail)
    before = [i for i in range(first[0]) if i not in opening]
    bounds = [first[0], *starts, last[-1] + 1]
    members = [list(range(bounds[s], bounds[s + 1])) for s in range(segments)]
    members[0] = [*sorted(opening), *members[0]]
    members[-1] += sorted(closing)
    after = _hand_back(program, tokens, anchors, members, last[-1] + 1)
    _leave_behind(program, members, anchors)
    _hand_on(program, members, anchors, invariant)
    tied = _tied(program, names, anchors, inner)
    members = [_by_use(program, row, tied, inner) for row in members]
    after = _results_only(program, tokens, members, anchors) + after
    before, *members, after = _with_parts(program, [before, *members, after])
    order = before + [i for row in members for i in row] + after
    sizes = [len(before), *(len(row) for row in members)]
    return Segmented(reorder(program, order), [sum(sizes[: s + 1]) for s in range(segments + 1)])


def _check_told_apart(anchors: dict[int, int], chosen: set[int], segments: int) -> None:
    """Check that each segment has an anchor among those chosen."""
    if {anchors[i] for i in chosen} != set(range(segments)):
        raise CaptureError(
            "some segments use no parameter of their own, so they cannot be told apart",
            remedy="is this a loop over segments? pass layers=... to name the list of layers",
        )


def _with_parts(program: Program, rows: list[list[int]]) -> list[list[int]]:
    """The rows with what takes its part of several results right behind the operation that makes them."""
    taken = parts(program.ops)
    behind = {i for some in taken.values() for i in some}
    return [[j for i in row if i not in behind for j in (i, *taken.get(i, ()))] for row in rows]


def _hand_back(
    program: Program, tokens: Sequence[Token], anchors: dict[int, int], members: list[list[int]], start: int
) -> list[int]:
    """Give each segment what was computed from it alone after the loop; what remains is the part after the loop."""
    segments = len(members)
    segment = {i: s for s, row in enumerate(members) for i in row}
    rest = [i for i in range(start, len(program.ops)) if i not in segment]
    extra: list[list[int]] = [[] for _ in members]
    for i in rest:
        found = [segment[j] for j in _inputs(program.ops[i]) if j in segment]
        segment[i] = anchors.get(i, max(found, default=segments))
        if segment[i] < segments - 1:
            extra[segment[i]].append(i)
    rest = [i for i in rest if segment[i] >= segments - 1]
    pattern = [tokens[i] for i in extra[-2]] if segments > 1 else []
    extra[-1] = sorted(_match_tail(program, tokens, rest, pattern))
    for row, more in zip(members, extra, strict=True):
        row += more
    return [i for i in rest if i not in set(extra[-1])]


def _results_only(
    program: Program, tokens: Sequence[Token], members: list[list[int]], anchors: dict[int, int]
) -> list[int]:
    """Take from the last segment what the one before does not run, and only results need."""
    if len(members) < 3:
        return []
    last = members[-1]
    placed = [[(tokens[i], program.ops[i].location, program.ops[i].origin.module) for i in row] for row in members[-2:]]
    alike = {last[k] for k in common_subsequence(placed[1], placed[0])}
    kept: set[int] = set()
    for i in reversed(last):
        if i in alike or i in anchors or i in kept:
            kept.add(i)
            kept.update(_inputs(program.ops[i]))
    moved = [i for i in last if i not in kept]
    members[-1] = [i for i in last if i in kept]
    return moved


def _leave_behind(program: Program, members: list[list[int]], anchors: dict[int, int]) -> None:
    """What a segment runs first, of what the one before made, and has no use for, is the end of that one."""
    segment = {i: s for s, row in enumerate(members) for i in row}
    for s, row in enumerate(members):
        start = min((i for i in row if i in anchors), default=0)
        made: dict[int, int] = {}  # of earlier segments alone: by the latest of them
        for i in row:
            of = [made.get(j, segment.get(j, -1)) for j in _inputs(program.ops[i])]
            if i < start and 0 <= max(of, default=-1) < s:
                made[i] = max(of)
        used = {j for i in row if i not in made for j in _inputs(program.ops[i])}
        for i in reversed(made):
            if i in used:
                used.update(_inputs(program.ops[i]))
        for i in made.keys() - used:
            segment[i] = made[i]
        row[:] = [i for i in row if segment[i] == s]
        for i in sorted(made.keys() - used):
            members[made[i]].append(i)


def _hand_on(program: Program, members: list[list[int]], anchors: dict[int, int], invariant: Sequence[bool]) -> None:
    """What a segment makes last of the text, or reads of what was there before, for the next is the start of that."""
    segment = {i: s for s, row in enumerate(members) for i in row}
    returned = {value.number for value in program.outputs.values() if type(value) is Val}
    loose: set[int] = set()
    for row in members:
        end = max((i for i in row if i in anchors), default=len(program.ops))
        for i in row:
            given = all(j in loose or j not in segment for j in _inputs(program.ops[i]))
            if i > end and given and (not invariant[i] or program.ops[i].target in VIEWS):
                loose.add(i)
    users: dict[int, int] = {}  # the first segment with a use for it
    moved: dict[int, None] = {}
    for i in reversed(range(len(program.ops))):
        home = segment.get(i, len(members))
        if i in loose and i not in returned and home < users.get(i, home) < len(members):
            home = users[i]
            moved[i] = None
        for j in _inputs(program.ops[i]):
            users[j] = min(users.get(j, home), home)
    for s, row in enumerate(members):
        members[s] = [i for i in row if i not in moved]
    for i in moved:
        members[users[i]].insert(0, i)


def _tied(
    program: Program, names: Sequence[tuple[str, ...]], anchors: dict[int, int], inner: dict[int, int]
) -> dict[int, int]:
    """The anchors that stay where they are: not those of other tensors than parameters, such as a mask of the caller's.

    What such a tensor is used for before the first layer may be for a later one alone.
    """
    kinds = {name: source.kind for source in program.sources.values() for name in source.names}
    of_layers = {kinds.get(name) for i in inner for name in names[i]}
    return {i: s for i, s in anchors.items() if not of_layers or of_layers & {kinds.get(name) for name in names[i]}}


def _by_use(program: Program, row: list[int], anchors: dict[int, int], inner: dict[int, int]) -> list[int]:
    """The operations of a segment with what no later anchor has a part in as soon as what it is made of is there.

    A memory that is written after all layers have run is then next to the layer that it belongs to. What is run before
    the first layer, but only later ones have a use for, waits for them.

        l0, l1, write m0, write m1   ->   l0, write m0, l1, write m1
    """
    inside = set(row)
    inputs = {i: [j for j in dict.fromkeys(_inputs(program.ops[i])) if j in inside] for i in row}
    users: dict[int, list[int]] = {}
    rank: dict[int, int] = {}  # the latest anchor that it is made of
    for i in row:
        rank[i] = i if i in anchors else max((rank[j] for j in inputs[i]), default=-1)
        for j in inputs[i]:
            users.setdefault(j, []).append(i)
    latest = dict(rank)  # that something is made of which it has a part in
    for i in reversed(row):
        for j in inputs[i]:
            latest[j] = max(latest[j], latest[i])
    needed = {i for i in row if i in anchors or latest[i] > rank[i]}
    loose = {i for i in row if latest[i] < 0}
    waiting = {i: sum(j not in loose for j in inputs[i]) for i in row}
    done: dict[int, None] = {}

    def emit(goal: int) -> None:
        work = [goal]
        while work:
            i = work[-1]
            missing = [j for j in inputs[i] if j not in done]
            if i in done or missing:
                work.pop() if i in done else work.extend(reversed(missing))
                continue
            done[work.pop()] = None
            ready = []
            for user in users.get(i, ()) if i not in loose else ():
                waiting[user] -= 1
                if not waiting[user] and user not in needed:
                    ready.append(user)
            work.extend(reversed(ready))

    start = min((i for i in row if i in anchors), default=0)
    turns = [i for i in row if i in inner]
    begun = next((k for k, i in enumerate(turns) if inner[i] != inner[turns[0]]), len(turns)) + 1
    early = _part_in(program, row, {start, *turns[:begun]})  # of which the first layer may be the reader
    late = {i for i in row if i < start and i in needed and i not in early}
    for i in (*(i for i in row if (i in needed and i not in late) or i in loose), *row):
        emit(i)
    return list(done)


def _part_in(program: Program, row: list[int], some: set[int]) -> set[int]:
    """The operations of a segment that have a part in some of them."""
    found = set(some)
    for i in reversed(row):
        if i in found:
            found.update(_inputs(program.ops[i]))
    return found


def reorder(program: Program, order: list[int]) -> Program:
    """A program with its operations in another order; those left out must not be used.

    Raises:
        CaptureError: if an operation would run before one of its operands.
    """
    if order == list(range(len(program.ops))):
        return program
    place = {old: Val(new) for new, old in enumerate(order)}
    ops: list[Op] = []

    def move(leaf: Any) -> Any:
        if type(leaf) is not Val:
            return leaf
        new = place.get(leaf.number)
        if new is None or new.number >= len(ops):
            raise CaptureError(
                "the operations of a segment cannot be told from those before and after the loop",
                location=op.location,
                remedy="compute what all segments share before the loop, and pass layers=... to name the layers",
            )
        return new

    for old in order:
        op = program.ops[old]
        ops.append(replace(op, args=map_leaves(op.args, move)))
    outputs = {name: place[value.number] if type(value) is Val else value for name, value in program.outputs.items()}
    return Program(ops, program.sources, outputs)


def _creates(op: Op) -> bool:
    """Whether an operation makes a tensor without reading one: ``zeros``, ``x.new_zeros``, ``ones_like``."""
    return (
        op.label.partition(".")[0].endswith("_like")
        or op.label.startswith("new_")
        or (not _inputs(op) and not any(type(leaf) is Src for leaf in leaves(op.args)))
    )


def _inputs(op: Op) -> list[int]:
    return [leaf.number for leaf in leaves(op.args) if type(leaf) is Val]


def _segment_major(program: Program, use: Uses, anchors: dict[int, int]) -> tuple[Program, list[int]]:
    """Layers outside, segments inside: order by the latest segment among the ancestors instead."""
    label = [-1] * len(program.ops)
    position = [-1] * len(program.ops)  # the segment of the last anchor that has run
    for i, op in enumerate(program.ops):
        position[i] = anchors.get(i, position[i - 1] if i else -1)
        label[i] = max([anchors.get(i, -1), *(label[j] for j in _inputs(op))])
    first_user: dict[int, int] = {}
    for i in reversed(range(len(program.ops))):
        user = first_user.get(i, -1)
        if i not in anchors:  # a view taken for the next segment is that segment's, and so is what is run in it
            view = program.ops[i].target in VIEWS
            label[i] = max(label[i], user if view else min(user, position[i]) if label[i] >= 0 else -1)
        for j in _inputs(program.ops[i]):
            first_user[j] = min(label[i], first_user.get(j, label[i]))
    order = sorted(range(len(program.ops)), key=lambda i: (label[i], i))
    return reorder(program, order), order


def _gather(
    program: Program, use: Uses, anchors: dict[int, int], chosen: set[int], segments: int
) -> tuple[Program, list[int], set[int]]:
    """Move what was run before the loop for one segment into it, and what all segments share out of it."""
    count = len(program.ops)
    first, last = min(chosen), max(chosen)
    users: list[list[int]] = [[] for _ in range(count)]
    for i, op in enumerate(program.ops):
        for j in _inputs(op):
            users[j].append(i)
    starts = [min(i for i in chosen if anchors[i] == s) for s in range(segments)]
    ends = [max(i for i in chosen if anchors[i] == s) for s in range(segments)]

    # Segment by position: sure between a segment's first and last anchor, else the segment that has just ended.
    position = [-1] * count
    segment = -1
    for i in range(count):
        while segment + 1 < segments and i >= starts[segment + 1]:
            segment += 1
        position[i] = segment if i <= last else segments
    keys: list[tuple[int, int, int]] = [(i, 0, 0) for i in range(count)]
    counter = 0
    # What depends on no text and is used by several segments is computed once, before the loop. An operation between
    # two segments is at home where it is used.
    shared: set[int] = set()
    home: list[int | None] = [None] * count
    # What each segment makes anew, of what the one before has made, is a memory, though of no text.
    where: dict[object, set[int]] = {}
    for i, op in enumerate(program.ops):
        where.setdefault((op.target, op.location), set()).add(position[i])
    renewed = {kind for kind, found in where.items() if len(found - {-1}) >= segments - 1}
    for i in reversed(range(count)):
        homes: set[int] = {at for j in users[i] if (at := -1 if j in shared else home[j]) is not None}
        between = i < first or not starts[position[i]] <= i <= ends[position[i]] if i <= last else False
        free = use.invariant[i] and i not in anchors and first <= i <= last and not between
        op = program.ops[i]
        handed_on = (
            (op.target, op.location) in renewed and i > first and max(homes, default=-1) - min(homes, default=0) < 2
        )
        if use.invariant[i] and i not in anchors and (len(homes) > 1 or homes == {-1}) and not handed_on:
            shared.add(i)
        elif (between or free) and homes:
            home[i] = min(each for each in homes if each is not None)
        # What is made of the text for results alone is at home where it is run.
        elif not between or (i > first and not users[i] and not use.invariant[i]):
            home[i] = position[i]
    work = list(shared)
    while work:  # an anchor that they need is no anchor
        for j in _inputs(program.ops[work.pop()]):
            if j not in shared:
                shared.add(j)
                work.append(j)
    for rank, i in enumerate(sorted(shared)):
        keys[i] = (-1, 0, rank)
    early = [
        i
        for i in range(last)
        if (i < first or (use.invariant[i] and i not in anchors and i <= ends[position[i]] and home[i] != position[i]))
        and not (i in shared or home[i] is None or _creates(program.ops[i]))
    ]
    kinds = {i: (_key(program.ops[i]), *(_key(program.ops[j]) for j in _inputs(program.ops[i]))) for i in early}
    fellows: dict[object, set[int | None]] = {}
    for i in early:
        fellows.setdefault(kinds[i], set()).add(home[i])
    early = [i for i in early if fellows[kinds[i]] != {0}]
    # What is made of a value, and of the text of segment 0, for segment 1 alone is what segment 0 leaves to it before
    # its own layers run.
    left: set[int] = set()
    others = {i for i in early if home[i] != 0}
    for i in early:
        inputs = _inputs(program.ops[i])
        if i < first and inputs and not fellows[kinds[i]] - {0, 1} and not (set(inputs) & others) - left:
            left.add(i)
    for i in reversed(early):  # those of segment 0 as well: then they stand where the others do
        if i not in left and users[i]:
            counter += 1
            keys[i] = (min(keys[j] for j in users[i])[0], -1, -counter)
    order = sorted(range(count), key=lambda i: keys[i])
    return reorder(program, order), order, shared


Token = tuple[object, ...]


def _match_head(
    program: Program, tokens: Sequence[Token], own: range, head: Sequence[Hashable], invariant: Sequence[bool]
) -> set[int]:
    """What the first segment runs before its first anchor: the other segments' head, as far as it is there.

    What is made of the text for that segment alone may come in another order there.
    """
    first, others = own.start, set[int]()  # what is used elsewhere
    for i in range(own.stop, len(program.ops)):
        others.update(_inputs(program.ops[i]))
    start = max(0, first - 4 * len(head) - 16)
    found = {start + i for i in common_subsequence(tokens[start:first], head)}
    missing = Counter(head)
    missing.subtract(tokens[i] for i in found)
    for i in reversed(range(start, first)):
        if i not in found and i not in others and not invariant[i] and missing[tokens[i]] > 0:
            missing[tokens[i]] -= 1
            found.add(i)
    for i in range(first):
        if i not in found and any(j in found for j in _inputs(program.ops[i])):
            found.add(i)
    return found


def _match_tail(
    program: Program, tokens: Sequence[Token], candidates: Sequence[int], tail: Sequence[Hashable]
) -> set[int]:
    """What the last segment runs after its last anchor: the other segments' tail, as far as it is there."""
    candidates = candidates[: 4 * len(tail) + 16]
    found = {candidates[i] for i in common_subsequence([tokens[i] for i in candidates], tail)}
    outside = set(candidates) - found
    for i in sorted(found):
        if any(j in outside for j in _inputs(program.ops[i])):
            found.remove(i)
            outside.add(i)
    return found
